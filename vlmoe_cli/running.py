"""What `pretrain` and `finetune` share: a run in this process, and its command for one of several."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlmoe_cli.output import Output
from vlmoe_cli.pushing import PATIENCE, background_push, push_after, push_request

if TYPE_CHECKING:
    from vlmoe_core.recipe.load import LoadedRecipe
    from vlmoe_core.train.reporter import Reporter
    from vlmoe_core.train.run import Outcome


@dataclass(frozen=True)
class Typed:
    """What was typed behind the recipe."""

    overrides: tuple[str, ...]
    model: Path | None
    out: Path | None
    resume: str | None
    overwrite: bool
    push_to: str | None
    public: bool
    json: bool

    def arguments(self, verb: str, recipe: str) -> list[str]:
        """The same command for one of several processes."""
        arguments = [verb, recipe, *(word for value in self.overrides for word in ("--set", value))]
        said = {"--model": self.model, "--out": self.out, "--resume": self.resume, "--push-to": self.push_to}
        arguments += [word for name, value in said.items() if value is not None for word in (name, str(value))]
        flags = {"--overwrite": self.overwrite, "--public": self.public, "--json": self.json}
        return arguments + [name for name, given in flags.items() if given]


def run_here(loaded: "LoadedRecipe", typed: Typed) -> "Outcome":
    """Run a recipe in this process, with its progress on stderr; its checkpoints go to the Hub where that is asked."""
    from vlmoe_cli.progress import progress
    from vlmoe_core.analysis.routing.watch import watch_routing
    from vlmoe_core.recipe.catalogue import expected_time
    from vlmoe_core.train.run import NoSaves, run_training
    from vlmoe_core.train.session import RunOptions

    pushes = background_push(Output(), push_request(typed.push_to, typed.public))
    options = RunOptions(typed.out, typed.resume, typed.overwrite)
    with progress() as reporter:
        if said := expected_time(loaded.text):
            reporter.note(f"expected time: {said}")
        try:
            outcome = run_training(loaded, options, reporter, watch_routing, pushes or NoSaves())
        finally:
            if pushes is not None:
                pushes.close(PATIENCE)
        if outcome.is_main and outcome.finished:
            _report(outcome.folder, reporter)
        return outcome


def run_in_processes(num_processes: int, verb: str, recipe: str, loaded: "LoadedRecipe", typed: Typed) -> None:
    """Run a recipe in so many processes of this machine; what can be known before they start is said once, here.

    Raises typer.Exit where they failed.
    """
    from vlmoe_core.train.launch import launch
    from vlmoe_core.train.mesh import check_processes
    from vlmoe_core.train.parallel import check_machine

    check_machine(loaded.recipe.train)
    check_processes(loaded.recipe, num_processes)
    if code := launch(num_processes, typed.arguments(verb, recipe)):
        raise typer.Exit(code)


def push_run(out: Output, outcome: "Outcome", typed: Typed) -> None:
    """Bring what a finished run left besides its checkpoints to the Hub, if asked to.

    Raises HubError, which tells how to push what is there: the run itself is done.
    """
    if not (outcome.is_main and outcome.finished):
        return
    from vlmoe_core.errors import HubError

    request = push_request(typed.push_to, typed.public)
    try:
        push_after(out, outcome.folder, request)
    except HubError as error:
        words = ["vlmoe", "push", str(outcome.folder), *(request.words if request else ())]
        raise HubError(f"{error}. The run itself is done; to push it: {shlex.join(words)}") from None


def _report(folder: Path, reporter: "Reporter") -> None:
    """Show what the experts or the codes do. A run that is done does not fail for that, whatever goes wrong."""
    from vlmoe_core.analysis.codes.files import report_on as report_on_codes
    from vlmoe_core.analysis.routing.files import report_on

    try:
        if (report := report_on(folder)) is not None:
            reporter.note(f"what the experts do: {report}")
    except Exception as error:
        reporter.note(f"no report of the routing ({error}); try vlmoe route-stats --model {folder}")
    try:
        if files := report_on_codes(folder):
            reporter.note(f"what the codes tell: {', '.join(map(str, files))}")
    except Exception as error:
        again = shlex.join(["vlmoe", "pretrain", str(folder / "recipe.yaml"), "--resume", str(folder)])
        reporter.note(f"no report of the codes ({error}); to try again: {again}")
