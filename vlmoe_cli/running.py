"""What `pretrain` and `finetune` share: a run in this process, and its command for one of several."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmoe_core.recipe.load import LoadedRecipe
    from vlmoe_core.train.reporter import Reporter
    from vlmoe_core.train.run import Outcome


def run_here(loaded: "LoadedRecipe", out: Path | None, resume: str | None, overwrite: bool) -> "Outcome":
    """Run a recipe in this process, with its progress on stderr."""
    from vlmoe_cli.progress import progress
    from vlmoe_core.analysis.routing.watch import watch_routing
    from vlmoe_core.recipe.catalogue import expected_time
    from vlmoe_core.train.run import run_training
    from vlmoe_core.train.session import RunOptions

    with progress() as reporter:
        if said := expected_time(loaded.text):
            reporter.note(f"expected time: {said}")
        outcome = run_training(loaded, RunOptions(out, resume, overwrite), reporter, watch_routing)
        if outcome.is_main and outcome.finished:
            _report(outcome.folder, reporter)
        return outcome


def _report(folder: Path, reporter: "Reporter") -> None:
    """Show what the experts do. A run that is done does not fail for that, whatever goes wrong."""
    from vlmoe_core.analysis.routing.files import report_on

    try:
        if (report := report_on(folder)) is not None:
            reporter.note(f"what the experts do: {report}")
    except Exception as error:
        reporter.note(f"no report of the routing ({error}); try vlmoe route-stats --model {folder}")


def run_arguments(
    verb: str,
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    resume: str | None,
    overwrite: bool,
    json: bool,
) -> list[str]:
    """The same command for one of several processes."""
    arguments = [verb, recipe, *(word for value in overrides or () for word in ("--set", value))]
    arguments += ["--out", str(out)] if out else []
    arguments += ["--resume", resume] if resume else []
    return arguments + ["--overwrite"] * overwrite + ["--json"] * json
