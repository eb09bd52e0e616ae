"""`vlmoe eval`: a finetuned model's metrics, with intervals, beside baselines and other models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmoe_cli.options import JsonOption, OnErrorOption, PublicOption, PushToOption
from vlmoe_cli.output import Output
from vlmoe_cli.pushing import push_request, send_after

if TYPE_CHECKING:
    from vlmoe_core.hub.push import PushRequest
    from vlmoe_core.tasks.task import Task
    from vlmoe_core.train.scoring import Asked, Evaluated
    from vlmoe_core.train.trained import Trained

EXAMPLES = (
    "vlmoe eval vqa",
    "vlmoe eval nlvr2 --model runs/quickstart-nlvr2 --split eval --json",
    "vlmoe eval vqa --data vqa-v2.yaml --split test --submission answers.json",
    "vlmoe eval classification --compare runs/dense",
)


def evaluate(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="vqa, nlvr2, retrieval, classification (imagenet) or nli (mnli).")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Run, checkpoint or model folder, or hf-hub:ORG/NAME; by default the newest run of the task.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Take the data of another recipe than the model's own.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, eval or test; by default test if there is one.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many examples.", show_default=False)] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Also write the answers as the task's server takes them.", show_default=False)
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Another model: a paired test on the same examples.", show_default=False)
    ] = None,
    on_error: OnErrorOption = None,
    push_to: PushToOption = None,
    public: PublicOption = False,
    json: JsonOption = False,
) -> None:
    """Score a finetuned model on a whole split, and keep the result beside the model."""
    from vlmoe_core.errors import UsageError
    from vlmoe_core.hub.measured import place_for
    from vlmoe_core.tasks.task import named_task, open_task
    from vlmoe_core.train.scoring import ask
    from vlmoe_core.train.trained import load_finetuned, newest_finetuned

    out = Output(json)
    name = named_task(task)
    push = push_request(push_to, public, f"Results of vlmoe eval {name}")
    model = model or newest_finetuned(name)
    trained = load_finetuned(model, name)
    if push is not None:
        place_for(trained, push)
    other = load_finetuned(compare, name) if compare is not None else None
    asked = ask(trained, data, split, limit, on_error)
    assert trained.recipe.task is not None
    kind = open_task(trained.recipe.task)
    if submission is not None and not kind.has_server:
        raise UsageError(f"{name} has no server that takes submissions; --json prints the metrics")
    answered = _answers(out, trained, other, asked, data)
    if answered is None:
        return
    evaluated, beside = answered
    if submission is not None:
        kind.write_submission(evaluated.records, evaluated.answers, submission)
        out.text(f"{len(evaluated.records):,} answers written: {submission}")
    if evaluated.scores is None and submission is not None:
        out.data({"task": name, "model": trained.name, "n": len(evaluated.records), "submission": submission})
        return
    report = _report(out, kind, trained, asked, evaluated, other, beside)
    _keep(out, model, trained, asked, report, push)


def _keep(
    out: Output, model: Path, trained: "Trained", asked: "Asked", report: dict[str, Any], push: "PushRequest | None"
) -> None:
    """Keep the result where the model lies, if the disk allows, and add it to the Hub if asked to."""
    from vlmoe_core.errors import TrainError
    from vlmoe_core.hub.measured import home_of, keep, result_files

    with home_of(model, trained.path) as home:
        try:
            keep(home, trained, asked, report)
        except TrainError as error:
            if push is not None:
                raise
            return out.warn(str(error))
        if push is not None:
            send_after(out, result_files(home, trained, push), push)


def _answers(
    out: Output, trained: "Trained", other: "Trained | None", asked: "Asked", data: str | None
) -> "tuple[Evaluated, Evaluated | None] | None":
    """What the model, and the one beside it, answer; null on all processes but the first."""
    from vlmoe_cli.progress import ScoringProgress
    from vlmoe_core.train.parallel import end_processes
    from vlmoe_core.train.scoring import accelerator_of, answer_all

    accelerator = accelerator_of()
    says = out.note if accelerator.is_main_process else lambda _: None
    says(f"model {trained.name}, step {trained.step}; data.{asked.split} of {data or 'its own recipe'}")
    if other is not None:
        says(f"compared with {other.name}, step {other.step}")
    progress = ScoringProgress(says)
    evaluated = answer_all(trained, asked, accelerator, progress)
    beside = answer_all(other, asked, accelerator, progress) if other is not None else None
    is_main = accelerator.is_main_process
    end_processes()
    return (evaluated, beside) if is_main else None


def _report(
    out: Output,
    kind: "Task",
    trained: "Trained",
    asked: "Asked",
    evaluated: "Evaluated",
    other: "Trained | None",
    beside: "Evaluated | None",
) -> dict[str, Any]:
    """Metrics, baselines, and the comparison, shown; the report."""
    from vlmoe_core.errors import DataError
    from vlmoe_core.train.scoring import baselines, comparison, report

    if evaluated.scores is None:
        raise DataError(
            f"data.{asked.split} does not hold the truth, so nothing can be scored; --submission FILE writes the "
            "answers for the task's server"
        )
    try:
        found = baselines(trained.recipe, evaluated)
    except DataError as error:
        out.warn(f"no baselines: the training data of the model's recipe can't be read ({error})")
        found = []
    result = report(kind, trained, asked, evaluated, found)
    _show(out, result)
    if other is not None and beside is not None:
        result["comparison"] = comparison(kind, evaluated, beside, other)
        out.record(result["comparison"], title="Paired comparison, percentage points")
    out.data(result)
    return result


def _show(out: Output, result: dict[str, Any]) -> None:
    """A row for each metric, with the baselines beside it."""
    rows = []
    for name, value in result["metrics"].items():
        low, high = result["intervals"].get(name, (None, None))
        row = {"metric": name, "percent": value, "95 % interval": None if low is None else f"{low:.1f} to {high:.1f}"}
        rows.append(row | {f"{baseline}": found.get(name) for baseline, found in result["baselines"].items()})
    left_out = f", {result['broken']} broken left out" if result["broken"] else ""
    out.table(rows, f"{result['task']}, {result['n']:,} examples of {result['split']}{left_out}")
