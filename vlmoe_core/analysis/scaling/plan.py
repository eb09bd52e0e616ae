"""The predicted step of a recipe on N devices: how long each part takes, what it needs of memory, what bounds it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vlmoe_core.analysis.estimate.wire import COUNT
from vlmoe_core.analysis.scaling.cost import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    group_of,
    left_over,
    reduce_scatter,
)
from vlmoe_core.analysis.scaling.machine import Machine
from vlmoe_core.analysis.scaling.work import Work

Shard = Literal["none", "full"]
BUCKET = 25 * 2**20
"""Bytes of a bucket of DistributedDataParallel (torch's default)."""
UPDATE = 40
"""Bytes read and written for a weight in an update: 28 by AdamW, 12 by clipping."""
PASSED = 16
"""Bytes read and written for an expert's weight each time its layer is passed, forward and backward: twice read in
bf16, its gradient written once and added up in float32."""
EXPERT_TENSORS = 4
"""Two weights and two biases, each with a sum of its own."""


@dataclass(frozen=True)
class Layout:
    """How N devices share the model."""

    world: int
    """N."""
    expert: int
    """parallel.expert."""
    shard: Shard
    """parallel.shard."""

    @property
    def data(self) -> int:
        """Replicas of each share of the experts."""
        return self.world // self.expert


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step, part by part, and bytes of memory of one device."""

    layout: Layout
    compute: float
    """Operations, at the sustained rate; what the busiest experts take longer included."""
    weights: float
    """Reading experts and writing their gradients, clipping and AdamW: bytes of memory."""
    exchange: float
    """Tokens to their experts and back; nothing runs meanwhile."""
    sync: float
    """Sums of gradients, as far as they are waited for."""
    gather: float
    """Weights gathered, as far as they are waited for (shard: full)."""
    memory: float
    """Bytes."""
    limit: float
    """Bytes that there are."""
    useful: float
    """Seconds of the operations alone, without recomputation and with experts that are all alike."""
    far: bool
    """Whether the group that shares the experts spans several nodes."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return {
            "compute": self.compute,
            "memory bandwidth": self.weights,
            "exchange between nodes" if self.far else "exchange inside a node": self.exchange,
            "gradient sync": self.sync,
            "gathering weights": self.gather,
        }

    @property
    def efficiency(self) -> float:
        """Share of the step that the operations alone would take."""
        return self.useful / self.seconds

    @property
    def fits(self) -> bool:
        """Whether there is memory enough."""
        return self.memory <= self.limit

    @property
    def bound(self) -> str:
        """What to have more of: memory where it does not fit, else the longest part."""
        return max(self.parts, key=lambda name: self.parts[name]) if self.fits else "memory"


def predict(work: Work, micros: int, layout: Layout, machine: Machine, imbalance: float | None = None) -> Step:
    """The step of a device that computes `micros` micro-batches one after the other.

    Args:
        work: of the model and one micro-batch.
        micros: micro-batches of a device in a step.
        layout: how the devices share the model.
        machine: the devices.
        imbalance: tokens of the busiest process over the mean of its group; null: the capacity factor, which bounds it,
            or 1 where tokens stay at home or none is dropped.
    """
    factor = 1.0 if layout.expert == 1 else imbalance or work.capacity or 1.0
    once = (work.flops + (factor - 1) * work.expert_flops) / machine.rate
    sync, gather = _sync(work, micros, layout, machine, once), 0.0
    if layout.shard == "full":
        sync, gather = 0.0, micros * _gather(work, layout, machine, once)
    return Step(
        layout=layout,
        compute=micros * once,
        weights=_weights(work, micros, layout, machine),
        exchange=micros * _exchange(work, layout, machine, factor),
        sync=sync,
        gather=gather,
        memory=_memory(work, micros, layout),
        limit=machine.memory,
        useful=micros * work.useful / machine.rate,
        far=group_of(layout.expert, 1, machine.fabric.node).nodes > 1,
    )


def layouts(work: Work, world: int) -> Iterator[Layout]:
    """All expert degrees that fit, with and without sharding."""
    for expert in range(1, world + 1):
        if world % expert == 0 and work.experts % expert == 0:
            yield from (Layout(world, expert, shard) for shard in _shards(world))


def _shards(world: int) -> tuple[Shard, ...]:
    return ("none", "full") if world > 1 else ("none",)


def best(steps: list[Step]) -> Step:
    """The fastest step that fits in memory; where none fits, the one that needs least."""
    fitting = [step for step in steps if step.fits]
    return min(fitting, key=lambda step: step.seconds) if fitting else min(steps, key=lambda step: step.memory)


def _exchange(work: Work, layout: Layout, machine: Machine, factor: float) -> float:
    """Forward: numbers of tokens, tokens, outputs; backward: the gradients of both; the forward ones again where
    activations are recomputed."""
    group = group_of(layout.expert, 1, machine.fabric.node)
    counts = all_to_all(float(COUNT * work.experts), group, machine.fabric)
    times = 2 if work.checkpointed else 1
    total = 0.0
    for one in work.passes:
        rows = all_to_all(factor * one.rows * work.dim * work.element, group, machine.fabric)
        total += one.layers * (times * (counts.seconds + 2 * rows.seconds) + 2 * rows.seconds)
    return total


def _sync(work: Work, micros: int, layout: Layout, machine: Machine, once: float) -> float:
    """DistributedDataParallel's sums run behind the last backward pass, all but the last bucket; those of shares of
    experts come after it."""
    everyone = group_of(layout.world, 1, machine.fabric.node)
    own = work.dense + (work.shared if layout.expert == 1 else 0)
    buckets = max(1, round(4 * own / BUCKET))
    bucket = all_reduce(4 * own / buckets, everyone, machine.fabric).seconds
    backward = machine.behind * once * 2 / 3
    waited = left_over((buckets - 1) * bucket, backward) + bucket
    if layout.expert == 1:
        return waited
    replicas = group_of(layout.data, layout.expert, machine.fabric.node)
    numbers = EXPERT_TENSORS * work.sparse
    each = all_reduce(4 * work.shared / layout.expert / numbers, replicas, machine.fabric)
    return waited + numbers * each.seconds if work.sparse else waited


def _gather(work: Work, layout: Layout, machine: Machine, once: float) -> float:
    """Of a micro-batch: weights before each forward and backward pass of a block, gradients once a backward pass.

    A recomputed forward pass finds the weights that its backward pass has gathered.
    """
    everyone = group_of(layout.world, 1, machine.fabric.node)
    replicas = group_of(layout.data, layout.expert, machine.fabric.node)
    dense, share = work.block * _padding(layout.world, work.dim), _padded_share(work, layout)
    block = all_gather(4 * dense, everyone, machine.fabric).seconds
    experts = all_gather(work.element * share, replicas, machine.fabric).seconds
    weights = work.runs * work.layers * block + sum(one.layers for one in work.passes) * experts
    gradients = work.layers * reduce_scatter(4 * dense, everyone, machine.fabric).seconds
    gradients += work.sparse * reduce_scatter(4 * share, replicas, machine.fabric).seconds
    behind = machine.behind * once
    return (
        left_over(weights, behind / 3) + left_over(weights + gradients, behind * 2 / 3) + _ends(work, everyone, machine)
    )


def _ends(work: Work, everyone: Group, machine: Machine) -> float:
    """What lies around the blocks, gathered once and summed once, which nothing runs beside."""
    ends = 4.0 * (work.dense - work.layers * work.block)
    there, back = all_gather(ends, everyone, machine.fabric), reduce_scatter(ends, everyone, machine.fabric)
    return there.seconds + back.seconds


def _padding(ranks: int, *lengths: int) -> float:
    """How much longer a dimension gets when it is cut into equal parts for so many ranks: the best of several."""
    return min(-(-length // ranks) * ranks / length for length in lengths)


def _padded_share(work: Work, layout: Layout) -> float:
    """Parameters of a process's experts of a layer, as fully_shard cuts them over their replicas: by experts, or inside
    each of them where that comes out even."""
    count = work.experts // layout.expert
    inside = max(_padding(layout.data, work.dim), _padding(layout.data, work.hidden))
    padding = 1.0 if inside == 1.0 else _padding(layout.data, count)
    return work.layer / layout.expert * padding


def _weights(work: Work, micros: int, layout: Layout, machine: Machine) -> float:
    share = work.shared / layout.expert
    held = work.dense + share if layout.shard == "none" else (work.dense + work.shared) / layout.world
    passed = sum(one.layers for one in work.passes) * work.layer / layout.expert
    return (UPDATE * held + micros * PASSED * passed) / machine.memory_rate


def _memory(work: Work, micros: int, layout: Layout) -> float:
    """Weights, gradients, two moments (16 bytes a weight), what is held beside them, activations.

    shard none: DistributedDataParallel's buckets (4 bytes) and copies in low precision. full: the weights of two layers
    while they are gathered, and the gradients of a whole share: an expert that several runs of the encoder pass has its
    gradients added up before they are cut.
    """
    share, low = work.shared / layout.expert, work.element if work.element < 4 else 0
    if layout.shard == "none":
        bucketed = work.dense + (work.shared if layout.expert == 1 else 0)
        buckets = 4 * bucketed if layout.world > 1 else 0
        return 16 * (work.dense + share) + buckets + low * (work.dense + share) + work.activations
    ends = work.dense - work.layers * work.block
    gathered = 2 * (4 * work.block + work.element * work.layer / layout.expert) + 4 * ends
    gradients = 4 * work.dense + work.element * share
    return 16 * (work.dense + work.shared) / layout.world + gathered + gradients + work.activations
