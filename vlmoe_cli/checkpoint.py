"""`vlmoe checkpoint inspect | verify | reshard`: what a checkpoint holds, whether it is still what was written, and the
same in other files."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, examples, group
from vlmoe_cli.output import Output
from vlmoe_cli.units import BYTES, one

if TYPE_CHECKING:
    from vlmoe_core.checkpoint.summary import Summary

app = group(
    help="Look into a checkpoint, check it, cut it anew.",
    epilog=examples(
        "vlmoe checkpoint inspect runs/quickstart-pretrain",
        "vlmoe checkpoint verify runs/quickstart-pretrain",
        "vlmoe checkpoint reshard runs/quickstart-pretrain moved --world 8 --expert 4",
    ),
)

PathArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A checkpoint folder (step-00000100), or a run: its newest.", show_default=False
    ),
]


@app.command(epilog=examples("vlmoe checkpoint inspect runs/quickstart-pretrain/checkpoints/step-00000100"))
def inspect(path: PathArgument, json: JsonOption = False) -> None:
    """Print step, size, tensors and experts of a checkpoint; reads no tensor."""
    from dataclasses import asdict

    from vlmoe_core.checkpoint.locate import resolve
    from vlmoe_core.checkpoint.summary import inspect_checkpoint

    summary = inspect_checkpoint(resolve(path))
    found = asdict(summary)
    out = Output(json)
    out.record(_facts(summary))
    out.table(found["groups"], "tensors on disk")
    out.table([{"sparse layer": layer, "experts": count} for layer, count in summary.experts.items()], "experts")
    out.data(found)


@app.command(epilog=examples("vlmoe checkpoint verify runs/quickstart-pretrain", "vlmoe checkpoint verify PATH --json"))
def verify(path: PathArgument, json: JsonOption = False) -> None:
    """Compare every byte of a checkpoint with its manifest; exit code 1 if anything differs."""
    from vlmoe_core.checkpoint.locate import resolve
    from vlmoe_core.checkpoint.summary import verify_checkpoint
    from vlmoe_core.errors import CheckpointError

    folder = resolve(path)
    reports = verify_checkpoint(folder)
    broken = [report for report in reports if report.problem]
    out = Output(json)
    out.table([{"file": report.name, "state": report.problem or "ok"} for report in reports], str(folder))
    files = [{"name": report.name, "problem": report.problem} for report in reports]
    out.data({"path": str(folder), "ok": not broken, "files": files})
    if broken:
        first = f"{broken[0].name} {broken[0].problem}"
        raise CheckpointError(
            f"{folder} is damaged in {len(broken)} of {len(reports)} places: {first}; use another one"
        )


@app.command(
    epilog=examples(
        "vlmoe checkpoint reshard runs/quickstart-pretrain moved",
        "vlmoe checkpoint reshard runs/base-32e moved --world 64 --expert 32",
        "vlmoe checkpoint reshard hf-hub:ORG/NAME moved --max-shard-size 500MB",
    )
)
def reshard(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is new or empty.", show_default=False)],
    world: Annotated[
        int, typer.Option(min=1, metavar="N", help="Cut it as so many processes would have written it.")
    ] = 1,
    expert: Annotated[
        int, typer.Option(min=1, metavar="P", help="So many of them share the experts: parallel.expert.")
    ] = 1,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="A file is cut before it grows beyond this: 500MB, 2GB.")
    ] = "1GiB",
    json: JsonOption = False,
) -> None:
    """Copy a checkpoint into other files, the tensors bit for bit. Any number of processes resumes from either.

    What its manifest lists is copied: not a card, results or a report that lie beside it.
    """
    from dataclasses import asdict

    from vlmoe_core.checkpoint.locate import resolve
    from vlmoe_core.checkpoint.reshard import Cut
    from vlmoe_core.checkpoint.reshard import reshard as run_reshard
    from vlmoe_core.hub.export.request import bytes_of

    source = resolve(path)
    written = run_reshard(source, out, Cut(world, expert, bytes_of(max_shard_size)))
    output = Output(json)
    output.record(
        {
            "checkpoint": out,
            "from": source,
            "step": written.step,
            "processes": f"{world}, of which {expert} share the experts" if expert > 1 else world,
            "files": f"{written.files} of tensors, {one(written.bytes, BYTES)}",
            "read back": f"{written.tensors:,} tensors, the same bit by bit",
        }
    )
    output.data({"path": str(out), "source": str(source), "world": world, "expert": expert} | asdict(written))


def _facts(summary: "Summary") -> dict[str, object]:
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return {
        "checkpoint": summary.path,
        "recipe": summary.recipe or None,
        "step": summary.step,
        "positions": ", ".join(f"{stream} {position}" for stream, position in summary.positions.items()) or None,
        "best score": summary.best_score,
        "parameters": f"{summary.parameters:,}",
        "size": f"{summary.bytes / 2**20:,.1f} MiB",
        "age": _age(time.time() - summary.created),
        "format": summary.format,
        "written by": versions,
    }


def _age(seconds: float) -> str:
    """A duration in its largest unit: 3 days, 5 hours, 12 minutes, 40 seconds."""
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{max(0, int(seconds))} seconds"
