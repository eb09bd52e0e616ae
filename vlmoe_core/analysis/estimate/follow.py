"""One step on fake tensors, of one process alone or of one among several: what comes and goes in its memory, and what
it sends."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmoe_core.analysis.estimate.collectives import Collective, Collectives
from vlmoe_core.analysis.estimate.fake import Device, build_on_meta, fake_batches, forward, make_fake
from vlmoe_core.analysis.estimate.inputs import streams_of
from vlmoe_core.analysis.estimate.live import LiveBytes, held
from vlmoe_core.analysis.estimate.routed import Routing, assume_routing
from vlmoe_core.analysis.estimate.routing import Group, groups_of
from vlmoe_core.analysis.estimate.scratch import expert_scratch
from vlmoe_core.analysis.estimate.world import imitated
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.objectives.loss import Loss
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train.bias import RouterBiases
from vlmoe_core.train.gradients import Gradients
from vlmoe_core.train.mesh import Mesh
from vlmoe_core.train.parallel import all_sum
from vlmoe_core.train.statistics import Statistics
from vlmoe_core.train.wrapping import is_cut, shared_parameters

INPUTS, ENCODER, SPARSE, HEADS, BACKWARD = "inputs", "encoder", "sparse", "heads", "backward"
GATHERED, UPDATE = "gathered", "update"
MICRO, SHARES, AGREEMENT = "micro-batch", "shares", "agreement"
"""When a process sends: in a micro-batch; gradients of shares of experts after the last one; small numbers."""

BESIDE_COUNTS, BESIDE_LOSSES = 2, 3
"""Numbers that the trainer sends with the counts of the losses (what is broken, what is refused) and with their sums (a
wish to stop, the state of a checkpoint)."""


@dataclass(frozen=True)
class StepMemory:
    """What comes and goes in a step, in bytes."""

    inputs: int
    """The micro-batches themselves, all that the device computes in a step: it gets them at the step's beginning."""
    encoder: int
    """Kept by the encoder's forward pass for the backward one, sparse layers left out."""
    sparse: int
    """Kept by the sparse layers: routing plans, tokens sorted by expert, hidden states and outputs of the experts."""
    heads: int
    """Kept by heads and losses: the logits."""
    gathered: int
    """Whole weights that fully_shard keeps from the forward pass to the backward one."""
    peak: int
    """The most bytes at one time, gradients included, weights and moments not."""

    @property
    def activations(self) -> int:
        """All that the forward pass keeps for the backward one."""
        return self.encoder + self.sparse + self.heads


@dataclass(frozen=True)
class Followed:
    """What a step on fake tensors tells of a process."""

    step: StepMemory
    weights: int
    """Bytes of parameters and buffers."""
    copies: int
    """Bytes of low-precision copies of expert weights."""
    gradients: int
    """Bytes of gradients."""
    buckets: int
    """Bytes of the gradients that DistributedDataParallel sums."""
    trained: frozenset[str]
    """Names of the parameters that got a gradient."""
    groups: tuple[Group, ...]
    """The routing groups that it met."""
    collectives: tuple[Collective, ...]
    """What it sent: in one micro-batch, and after the last."""


def follow(
    recipe: Recipe,
    labels: Labels,
    device: Device = "gpu",
    world: int = 1,
    waiting: Collection[str] = (),
    routing: Routing = "even",
) -> Followed:
    """Follow the last micro-batch of a step of the first process, and what comes after it.

    Args:
        recipe: the run; its micro-batch is taken with texts of the greatest length.
        labels: what the head of a task chooses from.
        device: kind of device.
        world: number of processes.
        waiting: parameters whose gradients are there already, from other micro-batches.
        routing: where tokens go, if processes share experts.
    """
    with imitated(recipe, world) as mesh:
        objective = build_on_meta(recipe, labels, device, mesh)
        assume_routing(objective, routing)
        with FakeTensorMode():
            make_fake(objective, recipe, mesh)
            return _Follower(recipe, objective, device, mesh, waiting).step()


class _Follower:
    """Takes the step."""

    def __init__(
        self, recipe: Recipe, objective: nn.Module, device: Device, mesh: Mesh, waiting: Collection[str]
    ) -> None:
        self.recipe, self.objective, self.mesh = recipe, objective, mesh
        self.before = _gradients_of_before(objective, waiting)
        self.held = [held(tensor) for tensor in (*objective.parameters(), *objective.buffers())]
        native = device == "gpu" and recipe.train.precision == "bf16"
        self.live = LiveBytes([*self.held, *self.before], partial(expert_scratch, native))
        self.sends = Collectives()
        _name_parts(objective, self.live)

    def step(self) -> Followed:
        recipe, objective = self.recipe, self.objective
        with self.live, self.sends:
            self.live.part, self.sends.part = INPUTS, MICRO
            batches = fake_batches(recipe, _micro_batch(recipe))
            self.live.part = HEADS
            loss, total = forward(recipe, objective, batches)
            if is_cut(objective):
                self.live.move(objective.parameters(), GATHERED)
            kept = self.live.alive.copy()
            self.live.part = BACKWARD
            total.backward()  # type: ignore[no-untyped-call]
            if self.mesh.size > 1:
                self._meet(loss)
        return self._told(loss, {part: size for part, size in kept.items()})

    def _meet(self, loss: Loss) -> None:
        """What processes tell each other after the last micro-batch, but for DistributedDataParallel's sums."""
        self.live.part, self.sends.part = UPDATE, SHARES
        gradients = Gradients(self.objective, self.mesh)
        gradients.sum_shares()
        self.sends.part = AGREEMENT
        gradients.clip(self.recipe.optim.clip_norm or inf)
        biases, statistics = RouterBiases(self.objective), Statistics(self.objective)
        biases.add(one for _, one in loss.routed)
        biases.update()
        statistics.add(loss.statistics)
        statistics.total()
        for more in (BESIDE_COUNTS, BESIDE_LOSSES):
            all_sum(torch.zeros(len(loss.parts) + more, dtype=torch.float64))

    def _told(self, loss: Loss, kept: dict[str, int]) -> Followed:
        objective, num_micro = self.objective, self.recipe.batch.num_micro
        others = (num_micro // self.mesh.size - 1) * kept.get(INPUTS, 0)
        copies = sum(buffer.nbytes for name, buffer in objective.named_buffers() if name.endswith(".copy"))
        found = {name: held(p.grad) for name, p in objective.named_parameters() if p.grad is not None}
        shares = {name for name, _ in shared_parameters(objective)}
        averaged = self.mesh.size > 1 and not is_cut(objective)
        return Followed(
            step=StepMemory(
                inputs=kept.get(INPUTS, 0) + others,
                encoder=kept.get(ENCODER, 0),
                sparse=kept.get(SPARSE, 0),
                heads=kept.get(HEADS, 0),
                gathered=kept.get(GATHERED, 0),
                peak=self.live.peak + others + _bytes(self.before),
            ),
            weights=_bytes(self.held) - copies,
            copies=copies,
            gradients=_bytes(found.values()),
            buckets=_bytes(found[name] for name in found if name not in shares) if averaged else 0,
            trained=frozenset(found),
            groups=groups_of(loss, num_micro),
            collectives=tuple(self.sends.seen),
        )


def _micro_batch(recipe: Recipe) -> dict[StreamName, int]:
    return {stream: recipe.batch.micro.of(stream) for stream in streams_of(recipe)}


def _gradients_of_before(objective: nn.Module, trained: Collection[str]) -> list[Tensor]:
    """Gradients that another micro-batch has left."""
    parameters = [parameter for name, parameter in objective.named_parameters() if name in trained]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return [held(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _name_parts(objective: nn.Module, live: LiveBytes) -> None:
    """Tell who makes tensors: the encoder, its sparse layers, or the heads and losses behind it."""
    for module in objective.modules():
        inside = {Encoder: ENCODER, SparseFFN: SPARSE}.get(type(module))
        if inside is not None:
            outside = HEADS if inside == ENCODER else ENCODER
            module.register_forward_pre_hook(partial(_enter, live, inside))
            module.register_forward_hook(partial(_leave, live, outside))


def _enter(live: LiveBytes, part: str, *_: Any) -> None:
    live.part = part


def _leave(live: LiveBytes, part: str, *_: Any) -> None:
    live.part = part
