"""`vlmoe upcycle`: a sparse model out of a dense one, which computes the same before it is trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.hub.upcycling.receipt import Load, Receipt

EXAMPLES = (
    "vlmoe upcycle runs/dense --experts 8 --layers every:2 --out models/sparse",
    "vlmoe upcycle runs/dense --experts 4 --layers 1,3 --modality vision --top-k 2 --out models/sparse",
    "vlmoe upcycle models/beit3 --experts 8 --drop 0.5 --out models/sparse",
)


def upcycle(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A dense model: run, checkpoint or model folder, or hf-hub:ORG/NAME[@REV]."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write; new or empty.", show_default=False)],
    experts: Annotated[int, typer.Option(min=1, help="Experts in each sparse layer.")] = 8,
    layers: Annotated[
        str,
        typer.Option(metavar="every:N|LIST", help="Blocks that become sparse: every:2 (1, 3, ...), or 0-based 1,3,5."),
    ] = "every:2",
    modality: Annotated[str, typer.Option(help="Whose networks: vision, text, or both by comma.")] = "vision,text",
    top_k: Annotated[int, typer.Option(min=1, help="Experts of each token.")] = 1,
    capacity_factor: Annotated[
        str, typer.Option(metavar="FACTOR|none", help="Capacity in training; none: dropless.")
    ] = "1.25",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="unit|renormalised|gate",
            help="How outputs are combined; by default what keeps the function: unit at k = 1, else renormalised.",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        float, typer.Option(min=0, help="Noise on the copies, relative to the spread of the weights.")
    ] = 0.0,
    drop: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of its hidden units that each expert draws anew (drop-upcycling)."),
    ] = 0.0,
    router_std: Annotated[
        float, typer.Option(help="Spread of the routers' random weights; the smaller, the less is dropped at first.")
    ] = 0.005,
    seed: Annotated[int, typer.Option(min=0, help="Of routers, noise and drawn units.")] = 0,
    json: JsonOption = False,
) -> None:
    """Copy the feed-forward networks of a dense model into experts, and measure what changed."""
    from vlmoe_core.hub.upcycling.recipe import Asked, parse_capacity, parse_layers, parse_modalities, parse_weights
    from vlmoe_core.hub.upcycling.upcycle import RECEIPT
    from vlmoe_core.hub.upcycling.upcycle import upcycle as run
    from vlmoe_core.hub.upcycling.weights import Ways

    output = Output(json)
    asked = Asked(
        ways=Ways(experts, router_std, noise, drop, seed),
        layers=parse_layers(layers),
        modalities=parse_modalities(modality),
        top_k=top_k,
        capacity_factor=parse_capacity(capacity_factor),
        weights=parse_weights(weights),
    )
    receipt = run(model, asked, out, tell=output.warn)
    for note in receipt.notes:
        output.warn(note)
    output.record(_facts(receipt))
    output.table([_row(load) for load in receipt.loads], "Experts, shares in percent")
    output.text(f"written: {out}, receipt: {out / RECEIPT}")
    output.data(receipt.as_json())


def _facts(receipt: "Receipt") -> dict[str, object]:
    apart, before, after = receipt.difference, receipt.before, receipt.after
    read = ", ".join(f"{count} {stream}" for stream, count in receipt.examples.items())
    places = "dropless" if receipt.capacity_factor is None else f"capacity {receipt.capacity_factor:g}"
    drops = ", ".join(f"{100 * share:.1f} at {factor}" for factor, share in receipt.dropped.items())
    return {
        "dense model": f"{receipt.source}, step {receipt.step}",
        "experts": f"{receipt.experts}, k = {receipt.top_k}, weights {receipt.weights}, {places} in training",
        "sparse blocks": "; ".join(f"{name} {', '.join(map(str, at))}" for name, at in receipt.layers.items()),
        "compared on": f"{receipt.samples}: {read}",
        "largest difference of states": f"{apart.states:.2g} (the largest state is {apart.largest_state:.2g})",
        "largest difference of outputs": apart.outputs,
        "loss, dense": apart.loss_before,
        "loss, sparse": apart.loss_after,
        "a capacity would drop %": drops,
        "parameters, dense": f"{before.total:,}, active {before.active:,}",
        "parameters, sparse": f"{after.total:,}, active {after.active:,}",
        "optimiser": "moments copied, routers begin at zero" if receipt.moments else "no moments in the source",
    }


def _row(load: "Load") -> dict[str, object]:
    return {
        "layer": load.layer,
        "modality": load.modality,
        "tokens": load.tokens,
        "busiest": _percent(load.busiest),
        "idlest": _percent(load.idlest),
        "gini": load.gini,
        "dropped in training": _percent(load.dropped),
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
