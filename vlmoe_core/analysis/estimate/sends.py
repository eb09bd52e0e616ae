"""What a process sends in a whole step, by kind."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlmoe_core.analysis.estimate import wire
from vlmoe_core.analysis.estimate.collectives import Collective
from vlmoe_core.analysis.estimate.follow import MICRO, SHARES, Followed

Kind = Literal["tokens", "counts", "gradients", "experts", "gathered", "scattered", "features", "small"]
KINDS: Mapping[Kind, str] = {
    "tokens": "tokens to experts and back",
    "counts": "numbers of tokens for experts",
    "gradients": "gradients, by DistributedDataParallel",
    "experts": "gradients of experts, over replicas",
    "gathered": "weights gathered by fully_shard",
    "scattered": "gradients scattered by fully_shard",
    "features": "features of pairs, for contrast",
    "small": "counts and sums of losses, norm",
}
"""What is sent, in words."""


@dataclass(frozen=True)
class Traffic:
    """What a process sends of one kind in a step, or receives if that is more."""

    kind: Kind
    """What it is."""
    calls: int | None
    """Collectives; null: torch decides."""
    ranks: int
    """Processes of the largest group."""
    even: int
    """Bytes, with tokens spread evenly over the experts."""
    one_sided: int
    """Bytes, where tokens choose experts of one process as long as these have places, and this process holds them."""
    how: Literal["counted", "modelled"]
    """counted: in a step on fake tensors; modelled: by formulas."""


def traffic(world: int, num_micro: int, even: Followed, one_sided: Followed) -> tuple[Traffic, ...]:
    """What the first process sends in a step.

    Args:
        world: number of processes.
        num_micro: micro-batches of a step, of all processes.
        even: a step with tokens spread evenly.
        one_sided: the worst case.
    """
    own = num_micro // world
    worst = _by_kind(one_sided.collectives)
    found = [_counted(kind, calls, worst[kind], own) for kind, calls in _by_kind(even.collectives).items()]
    if even.buckets:
        size = wire.all_reduce(even.buckets, world)
        found.append(Traffic("gradients", None, world, size, size, "modelled"))
    return tuple(sorted(found, key=lambda one: list(KINDS).index(one.kind)))


def _by_kind(collectives: Iterable[Collective]) -> dict[Kind, list[Collective]]:
    found: dict[Kind, list[Collective]] = {}
    for one in collectives:
        found.setdefault(_kind(one), []).append(one)
    return found


def _kind(one: Collective) -> Kind:
    if one.operation == "all-to-all":
        return "counts" if one.dtype.itemsize > 2 and not one.dtype.is_floating_point else "tokens"
    if one.operation == "all-gather":
        return "gathered"
    if one.operation == "reduce-scatter":
        return "scattered"
    if one.operation == "list-gather":
        return "features"
    return "experts" if one.part == SHARES else "small"


def _counted(kind: Kind, even: Sequence[Collective], worst: Sequence[Collective], own: int) -> Traffic:
    times = [own if one.part == MICRO else 1 for one in even]
    size, largest = (sum(t * one.wire for t, one in zip(times, calls, strict=True)) for calls in (even, worst))
    return Traffic(kind, sum(times), max(one.ranks for one in even), size, largest, "counted")
