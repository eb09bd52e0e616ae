"""`vlmoe finetune`: train a task on a pretrained model, or from scratch."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmoe_cli.options import (
    JsonOption,
    NumProcessesOption,
    OnErrorOption,
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
    from vlmoe_core.recipe.load import LoadedRecipe
    from vlmoe_core.train.run import Outcome

EXAMPLES = (
    "vlmoe finetune quickstart/vqa --model runs/quickstart-pretrain",
    "vlmoe finetune finetune/easy-vqa --seeds 3",
    "vlmoe finetune my.yaml --set optim.lr=1e-4 --out runs/mine",
)


def finetune(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    model: StartOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    overwrite: OverwriteOption = False,
    num_processes: NumProcessesOption = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Run so many seeds, from the recipe's on, and report mean and spread.")
    ] = 1,
    on_error: OnErrorOption = None,
    push_to: PushToOption = None,
    public: PublicOption = False,
    json: JsonOption = False,
) -> None:
    """Finetune a model on a task: vqa, nlvr2, retrieval, classification or nli."""
    from vlmoe_core.errors import UsageError
    from vlmoe_core.recipe.load import read_recipe
    from vlmoe_core.train.init import load_run_recipe

    changed = (*(overrides or ()), *([f"data.on_error={on_error}"] if on_error else []))
    task = read_recipe(recipe, changed).tree.child("task")
    if task is None or task.value is None:
        raise UsageError(f"'{recipe}' pretrains: it has an objective and no task; run it with vlmoe pretrain {recipe}")
    loaded = load_run_recipe(recipe, changed, model)
    typed = Typed(changed, model, out, resume, overwrite, push_to, public, json)
    runs = [(loaded, typed)]
    if seeds > 1:
        _check_alone(num_processes, typed)
        runs = [_seeded(recipe, loaded, typed, number) for number in range(seeds)]
    if num_processes is not None:
        for seeded, one in runs:
            run_in_processes(num_processes, "finetune", recipe, seeded, one)
        if seeds > 1:
            _show(Output(json), [one.out for _, one in runs if one.out], [], loaded)
        return
    outcomes = [_run(one, words) for one, words in runs]
    if outcomes[0].is_main:
        _show(Output(json), [outcome.folder for outcome in outcomes], outcomes, loaded)
    push_run(Output(json), outcomes[0], typed)


def _check_alone(num_processes: int | None, typed: Typed) -> None:
    """Raises UsageError where runs one after the other can't be."""
    from vlmoe_core.errors import UsageError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--seeds starts one run after the other: give --num-processes N instead of a launcher")
    if num_processes is not None and typed.json:
        raise UsageError("--seeds with --num-processes prints no JSON: every run's metrics.jsonl has its figures")
    if typed.push_to is not None:
        raise UsageError("--seeds makes several runs and --push-to takes one; push the one you want with vlmoe push")


def _run(one: "LoadedRecipe", typed: Typed) -> "Outcome":
    """One run in this process; Ctrl-C ends the command and tells how to go on."""
    outcome = run_here(one, typed)
    if outcome.signal is not None and not outcome.finished:
        if outcome.is_main:
            done = f"interrupted after step {outcome.step} of {one.recipe.train.steps}"
            Output().note(f"{done}; the same command with --resume auto goes on in {outcome.folder}")
        raise typer.Exit(128 + outcome.signal)
    return outcome


def _seeded(recipe: str, loaded: "LoadedRecipe", typed: Typed, number: int) -> tuple["LoadedRecipe", Typed]:
    """The recipe with another seed, and its run folder inside that of all seeds."""
    from vlmoe_core.train.init import load_run_recipe

    seed = loaded.recipe.seed + number
    whole = typed.out or Path(loaded.recipe.out or Path("runs") / loaded.name.replace("/", "-"))
    own = replace(typed, overrides=(*typed.overrides, f"seed={seed}"), out=whole / f"seed-{seed}")
    return load_run_recipe(recipe, own.overrides, typed.model), own


def _show(out: Output, folders: list[Path], outcomes: list["Outcome"], loaded: "LoadedRecipe") -> None:
    """The held-out metrics before and after, of one run or over seeds, and what to type next.

    Runs that other processes did have no outcomes here.
    """
    from vlmoe_core.train.metrics import read_metrics

    task = loaded.recipe.task
    assert task is not None
    lines = [read_metrics(folder / "metrics.jsonl", "eval") for folder in folders]
    rows = _rows(lines) if all(lines) else []
    most = loaded.recipe.train.eval_examples
    of_seeds = f", {len(folders)} seeds" if len(folders) > 1 else ""
    out.table(rows, f"Metrics in percent on at most {most:,} held-out examples{of_seeds}")
    done = {
        "broken examples skipped": sum(outcome.broken for outcome in outcomes),
        "time": f"{sum(outcome.seconds for outcome in outcomes) / 60:.1f} min",
    }
    out.record(
        {"run folder": ", ".join(map(str, folders))}
        | (done if outcomes else {})
        | {"next": f"vlmoe eval {task.name} --model {folders[-1]}"}
    )
    out.data(
        {
            "task": task.name,
            "folders": folders,
            "finished": all(outcome.finished for outcome in outcomes),
            "metrics": rows,
            "seconds": sum(outcome.seconds for outcome in outcomes),
            "broken": sum(outcome.broken for outcome in outcomes),
        }
    )


def _rows(lines: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each metric: before, after; over several seeds mean, standard deviation, and each."""
    names = [name.removeprefix("metric/") for name in lines[0][-1] if name.startswith("metric/")]
    if len(lines) == 1:
        first, last = lines[0][0], lines[0][-1]
        return [{"metric": n, "before": first.get(f"metric/{n}"), "after": last[f"metric/{n}"]} for n in names]
    from statistics import mean, stdev

    each = {name: [run[-1][f"metric/{name}"] for run in lines] for name in names}
    return [
        {"metric": name, "mean": mean(values), "standard deviation": stdev(values)}
        | {f"run {number}": value for number, value in enumerate(values)}
        for name, values in each.items()
    ]
