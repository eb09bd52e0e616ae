"""`vlmoe pretrain`: train a recipe from tokenizers to the last checkpoint."""

from typing import TYPE_CHECKING, Any

import typer

from vlmoe_cli.codes import code_rows, codes_report, next_with_codes
from vlmoe_cli.options import (
    JsonOption,
    NumProcessesOption,
    OutOption,
    OverwriteOption,
    PublicOption,
    PushToOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    StartOption,
)
from vlmoe_cli.output import Output
from vlmoe_cli.running import Typed, push_run, run_here, run_in_processes

if TYPE_CHECKING:
    from vlmoe_core.recipe.config import Recipe
    from vlmoe_core.train.run import Outcome


def pretrain(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    model: StartOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    overwrite: OverwriteOption = False,
    num_processes: NumProcessesOption = None,
    push_to: PushToOption = None,
    public: PublicOption = False,
    json: JsonOption = False,
) -> None:
    """Pretrain a model by masked data modelling on images, texts and pairs, or train a visual tokenizer."""
    from vlmoe_core.errors import UsageError
    from vlmoe_core.recipe.load import read_recipe
    from vlmoe_core.train.init import load_run_recipe

    task = read_recipe(recipe, overrides or ()).tree.child("task")
    if task is not None and task.value is not None:
        raise UsageError(f"'{recipe}' finetunes: it has a task and no objective; run it with vlmoe finetune {recipe}")
    loaded = load_run_recipe(recipe, overrides or (), model)
    typed = Typed(tuple(overrides or ()), model, out, resume, overwrite, push_to, public, json)
    if num_processes is not None:
        run_in_processes(num_processes, "pretrain", recipe, loaded, typed)
        return
    outcome = run_here(loaded, typed)
    if outcome.is_main:
        _show(Output(json), recipe, outcome, loaded.recipe)
    push_run(Output(json), outcome, typed)
    if outcome.signal is not None and not outcome.finished:
        raise typer.Exit(128 + outcome.signal)


def _show(out: Output, typed: str, outcome: "Outcome", recipe: "Recipe") -> None:
    """The losses before and after, where things lie, and what to type next."""
    from vlmoe_core.train.metrics import read_metrics
    from vlmoe_core.train.visual import trains_tokenizer

    lines = read_metrics(outcome.folder / "metrics.jsonl", "eval")
    codes = codes_report(outcome.folder) if trains_tokenizer(recipe) else None
    rows = _rows(lines[0], lines[-1]) if lines else []
    steps = f"step {lines[0]['step']} to {lines[-1]['step']}" if lines else ""
    if codes is None:
        out.table(rows, f"Held-out losses in nats, {steps}")
    else:
        out.table(code_rows(lines[0], lines[-1], codes) if lines else [], f"Held-out figures, {steps}")
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
            **({} if codes is None else {"codes": codes}),
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
    from vlmoe_core.train.visual import trains_tokenizer

    if not outcome.finished:
        return f"vlmoe pretrain {typed} --resume {outcome.folder}"
    if trains_tokenizer(recipe):
        return next_with_codes(recipe, outcome.folder)
    words = '--text "a red [MASK] left of a circle"'
    size = recipe.batch.size
    example = words if size.text else f"--image PICTURE {words}" if size.pair else "--image PICTURE"
    return f"vlmoe predict masked --model {outcome.folder} {example}"
