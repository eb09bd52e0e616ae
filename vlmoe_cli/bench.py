"""`vlmoe bench moe`: which expert backend suits this machine."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, examples, group
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.moe.bench import Measured

MOE_EXAMPLES = (
    "vlmoe bench moe",
    "vlmoe bench moe --dim 768 --experts 32 --tokens 8192 --top-k 2 --threads 2",
    "vlmoe bench moe --device cuda --dtype bfloat16 --backend grouped --json",
)

app = group(help="Measure this machine.", epilog=examples(*MOE_EXAMPLES))


@app.command(epilog=examples(*MOE_EXAMPLES))
def moe(
    dim: Annotated[int, typer.Option(metavar="N", min=1, help="Width of the layer.")] = 384,
    hidden: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Width in each expert; default: 4 x dim.", show_default=False),
    ] = None,
    experts: Annotated[int, typer.Option(metavar="N", min=1, help="Experts of the layer.")] = 16,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one pass.")] = 4096,
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", min=1, help="Experts that each token goes to.")] = 1,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16, float16 or float64.")] = "float32",
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this one: grouped, loop or tutel. Repeatable.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Times that each layer is timed.")] = 7,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads of the CPU; default: torch's own choice.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = "cpu",
    json: JsonOption = False,
) -> None:
    """Time every implementation of the experts against the dense layer of equal FLOPs, and take their memory.

    Forward and backward of one layer with its router and biases; every token is computed by all of its experts. Peak
    memory counts activations and temporaries on one thread, not the parameters and their gradients.
    """
    # Kineto, which records the memory, reports its own start and stop on stderr below this level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from dataclasses import asdict

    from vlmoe_core.moe.bench import Case, compare

    out = Output(json)
    case = Case(dim, hidden or 4 * dim, experts, tokens, top_k, dtype, device)
    with _progress(out) as say:
        found = compare(case, backend or (), repeats, threads, say)
    title = f"{dim} x {case.hidden}, {experts} experts, top-{top_k}, {tokens:,} tokens, {dtype}"
    out.table([_row(one) for one in found.measured], title)
    for one in found.unserved:
        out.text(f"{one.name}: not measured: {one.reason}")
    out.text(f"{found.machine}; median of {repeats}; dense: {dim} x {case.hidden * top_k}")
    out.data({"case": asdict(case), "repeats": repeats, **asdict(found)})


def _row(one: "Measured") -> dict[str, object]:
    return {
        "layer": one.name,
        "ms": one.seconds * 1e3,
        "over dense": round(one.over_dense, 3),
        "peak MiB": one.peak_bytes / 2**20,
        "peak over dense": round(one.peak_over_dense, 3),
    }


@contextmanager
def _progress(out: Output) -> Iterator[Callable[[str], None]]:
    """Says what goes on: one line that changes in a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield out.note
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
