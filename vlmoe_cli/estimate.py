"""`vlmoe estimate`: how big a run is, how long it takes and whether it fits."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, RecipeArgument, SetOption
from vlmoe_cli.output import Output, Row
from vlmoe_cli.rehearsing import arranged, holding_rows, wire_rows
from vlmoe_cli.units import BYTES, COUNTS, OPERATIONS, aligned, column, one

if TYPE_CHECKING:
    from vlmoe_core.analysis.estimate.estimate import Estimate
    from vlmoe_core.analysis.estimate.rehearsal import Rehearsal

EXAMPLES = (
    "vlmoe estimate quickstart/pretrain",
    "vlmoe estimate my.yaml --world 8 --tflops 150",
    "vlmoe estimate my.yaml --set train.precision=bf16 --json",
)


def estimate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="What one device really computes in a second while it trains, in 10^12 operations: the sustained "
            "rate, a third to a half of the peak that its maker states. Without it no hours.",
            show_default=False,
        ),
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Devices that share a step, and the model as `parallel` says; without it one that holds everything.",
            show_default=False,
        ),
    ] = None,
    on: Annotated[str, typer.Option(metavar="gpu|cpu", help="Kind of device whose memory is estimated.")] = "gpu",
    labels: Annotated[
        int | None,
        typer.Option(
            min=2, help="Labels of a task whose data decide on them: vqa, classification; 1,000.", show_default=False
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Tell parameters, operations, memory and hours of a run before it starts.

    Reads nothing but the recipe, and needs neither a GPU nor the memory that it speaks of.
    """
    from vlmoe_core.analysis.estimate.estimate import Machine
    from vlmoe_core.analysis.estimate.estimate import estimate as estimate_run
    from vlmoe_core.errors import UsageError
    from vlmoe_core.train.init import load_planned_recipe

    if on not in ("gpu", "cpu"):
        raise UsageError(f"--on {on}: say gpu or cpu")
    out = Output(json)
    planned = load_planned_recipe(recipe, set_ or ())
    found = estimate_run(planned.loaded.recipe, Machine("gpu" if on == "gpu" else "cpu", world, tflops), labels)
    out.data({"recipe": planned.loaded.name, "start": planned.start, **found.as_json()})
    if not json:
        _print(out, found, planned.loaded.recipe.train.steps, planned.start)


def _print(out: Output, found: "Estimate", steps: int, start: str | None) -> None:
    out.table(_parameter_rows(found), "parameters (exact)")
    out.table(_flop_rows(found), f"\noperations of one example in training ({found.flops_how})")
    out.table(_routing_rows(found), "\ntokens of an expert in one micro-batch (exact, were all experts alike)")
    if found.rehearsal is not None:
        out.table(holding_rows(found.rehearsal), f"\n{_several(found.rehearsal)} (exact)")
    out.table(_memory_rows(found), f"\nmemory of one {found.memory.device.upper()}{_of(found.rehearsal)}")
    if found.rehearsal is not None:
        out.table(wire_rows(found.rehearsal), "\nsent by one device in a step")
    out.record(dict(_whole_run(found, steps)), "\nthe whole run")
    out.record({str(n): line for n, line in enumerate(found.not_counted, 1)}, "\nnot counted")
    assumed = (*found.otherwise, *([start] if start else []))
    out.record({str(n): line for n, line in enumerate(assumed, 1)}, "\ntaken to be so")


def _several(found: "Rehearsal") -> str:
    return f"{found.size} devices: {arranged(found)}"


def _of(found: "Rehearsal | None") -> str:
    return "" if found is None else f" of {found.size} (rank 0)"


def _parameter_rows(found: "Estimate") -> list[Row]:
    parameters = found.parameters
    rows = {
        "all": (parameters.total, parameters.active),
        "encoder": (parameters.encoder, parameters.encoder_active),
        "heads": (parameters.heads, parameters.heads),
        "routers, part of the encoder": (parameters.routers, parameters.routers),
        **{f"encoder, passed by {_input(s)}": (None, number) for s, number in parameters.paths.items()},
    }
    totals = aligned(["-" if total is None else one(total, COUNTS) for total, _ in rows.values()])
    active = aligned([one(used, COUNTS) for _, used in rows.values()])
    return [
        {"": name, "in all": total, "applied per token": used}
        for name, total, used in zip(rows, totals, active, strict=True)
    ]


def _input(stream: str) -> str:
    return {"image": "an image", "text": "a text", "pair": "a pair"}[stream]


def _flop_rows(found: "Estimate") -> list[Row]:
    cells = {
        stream: column([of.forward, of.heads, of.backward, of.recompute, of.total], OPERATIONS)
        for stream, of in found.flops.items()
    }
    names = ("forward", "heads, part of it", "backward", "recomputed", "in all")
    return [{"": name, **{stream: values[i] for stream, values in cells.items()}} for i, name in enumerate(names)]


def _routing_rows(found: "Estimate") -> list[Row]:
    return [
        {
            "input": group.stream,
            "experts": f"{group.layers} x {group.experts} {group.pool}",
            "tokens": group.tokens,
            "an expert": round(group.mean, 1),
            "capacity": group.capacity,
            "places": group.places,
            "in a step": round(group.effective_batch),
        }
        for group in found.groups
    ]


def _memory_rows(found: "Estimate") -> list[Row]:
    memory = found.memory
    both = ((memory.plain, False), (memory.checkpointed, True))
    always = {
        "weights": (memory.weights, "exact"),
        "low-precision copies of experts": (memory.copies, "exact"),
        "AdamW's moments": (memory.moments, "exact"),
        "buckets of gradients (several devices)": (memory.buckets, "exact"),
        "gradients": (memory.gradients, "exact"),
    }
    steps = {
        "micro-batches of a step": [step.inputs for step, _ in both],
        "kept by the encoder": [step.encoder for step, _ in both],
        "kept by sparse layers: dispatch buffers": [step.sparse for step, _ in both],
        "kept by heads and losses: logits": [step.heads for step, _ in both],
        "kept by fully_shard: gathered weights": [step.gathered for step, _ in both],
        "PEAK": [memory.peak(checkpointed) for _, checkpointed in both],
        "PEAK, tokens go to its experts alone": [found.worst.peak(checkpointed) for _, checkpointed in both],
    }
    if found.rehearsal is None or found.rehearsal.shard == "none":
        del steps["kept by fully_shard: gathered weights"]
    if found.worst == memory:
        del steps["PEAK, tokens go to its experts alone"]
    names, how = [*always, *steps], [*(how for _, how in always.values()), *("counted" for _ in steps)]
    values = [*([size, size] for size, _ in always.values()), *steps.values()]
    cells = column([value for pair in values for value in pair], BYTES)
    titles = [f"checkpointing {'on' if on else 'off'}{' *' * (on == memory.checkpoints)}" for on in (False, True)]
    return [
        {"": name, titles[0]: cells[2 * i], titles[1]: cells[2 * i + 1], "how": how[i]} for i, name in enumerate(names)
    ]


def _whole_run(found: "Estimate", steps: int) -> Iterator[tuple[str, str]]:
    machine, memory = found.machine, found.memory
    yield "a step", f"{one(found.step_flops, OPERATIONS)} ({found.flops_how})"
    yield f"{steps:,} steps", f"{one(found.step_flops * steps, OPERATIONS)} ({found.flops_how})"
    yield "a checkpoint", f"{one(memory.checkpoint, BYTES)} (exact: weights and moments)"
    if found.hours is None:
        yield "hours", "give the sustained rate of one device: --tflops 150"
    else:
        devices = f"{machine.devices} device{'s' * (machine.devices > 1)}"
        yield "hours", f"{found.hours:,.3g} on {devices} of {machine.tflops:g} sustained TFLOP/s (modelled)"
    yield "*", "as the recipe says"
