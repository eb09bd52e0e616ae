"""What several processes would do together, in words: tables of `vlmoe estimate`, lines of `vlmoe validate`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from vlmoe_cli.output import Row
from vlmoe_cli.units import BYTES, COUNTS, aligned, one

if TYPE_CHECKING:
    from vlmoe_core.analysis.estimate.rehearsal import Rehearsal
    from vlmoe_core.analysis.estimate.shares import Holding
    from vlmoe_core.recipe.config import Recipe
    from vlmoe_core.train.validate import Check


def checks_of_world(recipe: "Recipe", world: int) -> "Iterator[Check]":
    """Build the share of every process and follow a step of the first one; a check for each thing that was found."""
    from vlmoe_core.analysis.estimate.rehearsal import rehearse
    from vlmoe_core.train.stand_ins import MADE_UP_LABELS, stand_in_labels
    from vlmoe_core.train.validate import Check

    found = rehearse(recipe, stand_in_labels(recipe, MADE_UP_LABELS), world)
    figures = found.as_json()
    yield Check(_ranks_name(found), _ranks_detail(found), figures={"ranks": [asdict(h) for h in found.holdings]})
    step = {"peak": found.peak, "worst_peak": found.worst_peak}
    yield Check("step of rank 0", _step_detail(found, recipe), figures=step)
    yield Check("on the wire", _wire_detail(found), figures=figures["wire"])


def _ranks_name(found: "Rehearsal") -> str:
    return "rank 0" if found.size == 1 else f"rank 0..{found.size - 1}"


def _ranks_detail(found: "Rehearsal") -> str:
    most, least = found.most, found.least
    same = most.parameters == least.parameters
    sizes = f"{most.parameters:,}" if same else f"{least.parameters:,} to {most.parameters:,}"
    return (
        f"{arranged(found)}; built with {sizes} parameters each "
        f"({one(most.experts, COUNTS)} of experts, {one(most.dense, COUNTS)} others), {one(most.bytes, BYTES)} with "
        f"moments{' and buckets' if most.buckets else ''}"
    )


def arranged(found: "Rehearsal") -> str:
    """How the processes share the model."""
    shares = f" x {found.expert} shares of experts" if found.expert > 1 else ""
    return f"{found.replicas} replica{'s' * (found.replicas > 1)}{shares}, shard {found.shard}"


def _step_detail(found: "Rehearsal", recipe: "Recipe") -> str:
    from vlmoe_core.analysis.estimate.inputs import streams_of

    sizes = ", ".join(f"{recipe.batch.micro.of(stream)} {stream}" for stream in streams_of(recipe))
    again = f" ({found.micros} times a step)" if found.micros > 1 else ""
    worst = "" if found.expert == 1 else f"; {one(found.worst_peak, BYTES)} if tokens go to its experts alone"
    return (
        f"forward and backward on fake tensors, {sizes} examples{again}; peak {one(found.peak, BYTES)} on a GPU"
        f"{' if experts get the same' if worst else ''}{worst}"
    )


def _wire_detail(found: "Rehearsal") -> str:
    from vlmoe_core.analysis.estimate.sends import KINDS

    big = [kind for kind in found.traffic if kind.kind not in ("counts", "small")]
    parts = [f"{one(kind.even, BYTES)} of {KINDS[kind.kind]}{_worst(kind.even, kind.one_sided)}" for kind in big]
    calls = sum(kind.calls or 0 for kind in found.traffic if kind not in big)
    rest = sum(kind.even for kind in found.traffic if kind not in big)
    parts.append(f"{one(rest, BYTES)} in {calls} small messages")
    return f"rank 0 sends {one(found.wire, BYTES)} a step: {'; '.join(parts)}"


def _worst(even: int, worst: int) -> str:
    return "" if even == worst else f" ({one(worst, BYTES)} at worst)"


def holding_rows(found: "Rehearsal") -> list[Row]:
    """What the processes hold."""
    both = {"the most": found.most, "the least": found.least}
    if found.most.parameters == found.least.parameters:
        both = {"each": found.most}
    return [{"": name, **_holding_row(holding)} for name, holding in both.items()]


def _holding_row(holding: "Holding") -> Row:
    return {
        "parameters": one(holding.parameters, COUNTS),
        "of experts": one(holding.experts, COUNTS),
        "weights": one(holding.weights, BYTES),
        "copies": one(holding.copies, BYTES),
        "moments": one(holding.moments, BYTES),
        "buckets": one(holding.buckets, BYTES),
    }


def _sizes(values: Sequence[int]) -> list[str]:
    return aligned([one(value, BYTES) for value in values])


def wire_rows(found: "Rehearsal") -> list[Row]:
    """What a process sends."""
    from vlmoe_core.analysis.estimate.sends import KINDS

    names = [*(KINDS[kind.kind] for kind in found.traffic), "in all"]
    calls = [*(kind.calls for kind in found.traffic), None]
    ranks = [*(kind.ranks for kind in found.traffic), None]
    even = _sizes([*(kind.even for kind in found.traffic), found.wire])
    worst = _sizes([*(kind.one_sided for kind in found.traffic), found.worst_wire])
    how = [*(kind.how for kind in found.traffic), ""]
    return [
        {"": name, "calls": calls[i], "among": ranks[i], "even": even[i], "at worst": worst[i], "how": how[i]}
        for i, name in enumerate(names)
    ]
