"""`vlmoe pretrain`: train a recipe from tokenizers to the last checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmoe_cli.options import JsonOption, RecipeArgument, SetOption
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.recipe.config import Recipe
    from vlmoe_core.train.run import Outcome


def pretrain(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/NAME.", show_default=False)] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Go on with a run: auto takes the newest checkpoint of the run folder, or starts it.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the run folder.")] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, help="Start so many processes through Accelerate's launcher.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Pretrain a model by masked data modelling on images, texts and pairs."""
    from vlmoe_core.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if num_processes is not None:
        from vlmoe_core.train.launch import launch

        raise typer.Exit(launch(num_processes, _arguments(recipe, overrides or [], out, resume, overwrite, json)))

    from vlmoe_cli.progress import progress
    from vlmoe_core.train.run import pretrain as run
    from vlmoe_core.train.session import RunOptions

    with progress() as reporter:
        outcome = run(loaded, RunOptions(out, resume, overwrite), reporter)
    if outcome.is_main:
        _show(Output(json), recipe, outcome, loaded.recipe)
    if outcome.signal is not None and not outcome.finished:
        raise typer.Exit(128 + outcome.signal)


def _arguments(
    recipe: str, overrides: list[str], out: Path | None, resume: str | None, overwrite: bool, json: bool
) -> list[str]:
    """The same command for one of several processes."""
    arguments = ["pretrain", recipe, *(word for value in overrides for word in ("--set", value))]
    arguments += ["--out", str(out)] if out else []
    arguments += ["--resume", resume] if resume else []
    return arguments + ["--overwrite"] * overwrite + ["--json"] * json


def _show(out: Output, typed: str, outcome: "Outcome", recipe: "Recipe") -> None:
    """The losses before and after, where things lie, and what to type next."""
    from vlmoe_core.train.metrics import read_metrics

    lines = read_metrics(outcome.folder / "metrics.jsonl", "eval")
    rows = _rows(lines[0], lines[-1]) if lines else []
    title = f"Held-out losses in nats, step {lines[0]['step']} to {lines[-1]['step']}" if lines else ""
    out.table(rows, title)
    out.record(
        {
            "run folder": outcome.folder,
            "metrics": outcome.folder / "metrics.jsonl",
            "checkpoints": outcome.folder / "checkpoints",
            "broken examples skipped": outcome.broken,
            "time": f"{outcome.seconds / 60:.1f} min",
            "next": _next_command(typed, outcome, recipe),
        },
        title="" if outcome.finished else f"Interrupted after step {outcome.step} of {recipe.train.steps}",
    )
    out.data(
        {
            "folder": outcome.folder,
            "step": outcome.step,
            "finished": outcome.finished,
            "losses": rows,
            "seconds": outcome.seconds,
            "broken": outcome.broken,
        }
    )


def _rows(first: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    from vlmoe_cli.progress import losses_of

    return [
        {
            "loss": name,
            "before": before,
            "after": last[f"loss/{name}"],
            "unigram baseline": first.get(f"baseline/{name}"),
        }
        for name, before in losses_of(first).items()
    ]


def _next_command(typed: str, outcome: "Outcome", recipe: "Recipe") -> str:
    if not outcome.finished:
        return f"vlmoe pretrain {typed} --resume {outcome.folder}"
    words = '--text "a red [MASK] left of a circle"'
    size = recipe.batch.size
    example = words if size.text else f"--image PICTURE {words}" if size.pair else "--image PICTURE"
    return f"vlmoe predict masked --model {outcome.folder} {example}"
