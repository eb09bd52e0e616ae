"""`vlmoe route-stats`: what the experts of a model do, in numbers and as a report."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, PublicOption, PushToOption, WithImagesOption
from vlmoe_cli.output import Output
from vlmoe_cli.pushing import push_request, send_after

if TYPE_CHECKING:
    from vlmoe_core.analysis.routing.raw import Write
    from vlmoe_core.analysis.routing.run import Found, Process
    from vlmoe_core.analysis.routing.summary import CellSummary

EXAMPLES = (
    "vlmoe route-stats",
    "vlmoe route-stats --model runs/mine --capacity eval --out report",
    "vlmoe route-stats --data quickstart/vqa --limit 500 --json",
    "vlmoe route-stats --compare runs/other --raw trace.jsonl",
)


def route_stats(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Run, checkpoint or model folder, or hf-hub:ORG/NAME; by default the newest run with experts.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE_OR_RUN", help="Route the data of another recipe than the model's own.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, eval or test; by default test if there is one.", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="What to count, by comma: mlm, mim, vlm, or the data's task; by default all.", show_default=False
        ),
    ] = None,
    capacity: Annotated[
        str, typer.Option(metavar="train|eval|dropless|FACTOR", help="Places of an expert; decides what is dropped.")
    ] = "train",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="At most so many examples of each stream; by default train.eval_examples.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Another model: do tokens go to the same experts?", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; by default report/ in the run.", show_default=False)
    ] = None,
    raw: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write every token's experts, to a .jsonl or .parquet file.", show_default=False
        ),
    ] = None,
    push_to: PushToOption = None,
    public: PublicOption = False,
    with_images: WithImagesOption = False,
    json: JsonOption = False,
) -> None:
    """Show what the experts do: load, drops, entropy, and what each of them likes."""
    from vlmoe_cli.progress import ScoringProgress
    from vlmoe_core.analysis.routing.files import make_folder, report_folder, write_all
    from vlmoe_core.analysis.routing.request import Asked, make_request, with_capacity
    from vlmoe_core.analysis.routing.run import Process, route
    from vlmoe_core.hub.measured import place_for, routing_files
    from vlmoe_core.train.parallel import end_processes, on_main
    from vlmoe_core.train.scoring import accelerator_of
    from vlmoe_core.train.trained import load_trained, newest_sparse

    output, push = Output(json), push_request(push_to, public, "Routing report of vlmoe route-stats")
    trained = load_trained(model or newest_sparse())
    if push is not None:
        place_for(trained, push)
    chosen = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    request = make_request(trained, Asked(data, split, chosen, limit, capacity))
    other = with_capacity(load_trained(compare), capacity) if compare is not None else None
    accelerator = accelerator_of()
    says = output.note if accelerator.is_main_process else lambda _: None
    says(
        f"model {trained.name}, step {trained.step}; data.{request.split} of {request.data}, {_words(request.capacity)}"
    )
    process = Process(accelerator.device, accelerator.process_index, accelerator.num_processes)
    folder = out or report_folder(trained.path)
    on_main(partial(make_folder, folder))
    with _raw(raw, process) as write:
        found = route(request, other, process, ScoringProgress(says), write)
    end_processes()
    if found is not None:
        _show(output, found, write_all(found, folder))
        if push is not None:
            send_after(output, routing_files(folder, trained, push, with_images), push)


def _raw(file: Path | None, process: "Process") -> "AbstractContextManager[Write | None]":
    """What writes the raw trace."""
    from vlmoe_core.analysis.routing.raw import raw_file
    from vlmoe_core.errors import UsageError

    if file is not None and process.ranks > 1:
        raise UsageError("--raw writes one file, in order: leave it away, or run route-stats in one process")
    return nullcontext() if file is None else raw_file(file)


def _words(capacity: Mapping[str, str]) -> str:
    if not capacity:
        return "no sparse layer"
    return "capacity " + ", ".join(f"{pool} {words}" for pool, words in capacity.items())


def _show(output: Output, found: "Found", files: list[Path]) -> None:
    cells = found.summary.cells
    if not cells:
        output.text("no sparse layer met a token: the model is dense there, so there is nothing to route")
    output.table([_row(cell) for cell in cells], "Routing, shares in percent")
    output.table(
        [
            {
                "task": c.task,
                "layer": c.layer,
                "modality": c.modality,
                "same expert": 100 * c.same,
                "by chance": 100 * c.chance,
                "shared information": 100 * c.shared_information,
            }
            for c in found.summary.comparison
        ],
        f"Tokens that go to the same expert in {found.summary.other}",
    )
    for file in files:
        output.text(f"written: {file}")
    output.data(found.summary.as_json())


def _row(cell: "CellSummary") -> dict[str, object]:
    told = max(cell.information.items(), key=lambda one: one[1].excess, default=None)
    return {
        "task": cell.task,
        "layer": cell.layer,
        "modality": cell.modality,
        "tokens": cell.tokens,
        "dropped": 100 * cell.dropped,
        "busiest": 100 * max(cell.wanted) / max(1, sum(cell.wanted)),
        "dead": len(cell.dead),
        "gini": cell.gini,
        "entropy": cell.entropy,
        "confidence": 100 * cell.confidence,
        "tells most of": "-" if told is None else f"{told[0]} ({told[1].excess:.2f} bits)",
    }
