"""Memory of one device in a training step: by formulas what is always there, by a step on fake tensors what comes and
goes.

Shapes: N rows sorted by expert, D width, H hidden width, E experts, K choices of a token.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmoe_core.analysis.estimate.fake import (
    Device,
    build_on_meta,
    fake_batches,
    forward,
    make_fake,
    trained_parameters,
)
from vlmoe_core.analysis.estimate.inputs import streams_of
from vlmoe_core.analysis.estimate.live import LiveBytes
from vlmoe_core.analysis.estimate.routing import Group, groups_of
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.native import ALIGNMENT
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import Labels

EXPERTS, EXPERTS_BACKWARD = "vlmoe::expert_ffn", "vlmoe::expert_ffn_backward"
INPUTS, ENCODER, SPARSE, HEADS, BACKWARD = "inputs", "encoder", "sparse", "heads", "backward"


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
    peak: int
    """The most bytes at one time, gradients included, weights and moments not."""

    @property
    def activations(self) -> int:
        """All that the forward pass keeps for the backward one."""
        return self.encoder + self.sparse + self.heads


@dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes."""

    device: Device
    """Whose arithmetic is followed."""
    weights: int
    """Parameters and buffers, float32."""
    copies: int
    """Low-precision copies of the expert weights."""
    gradients: int
    """Of all trained parameters, float32."""
    moments: int
    """The two moments of AdamW."""
    buckets: int
    """DistributedDataParallel's buckets, which hold every gradient once more; 0 on a single device."""
    plain: StepMemory
    """A step that keeps its activations."""
    checkpointed: StepMemory
    """A step with activation checkpointing."""
    checkpoints: bool
    """Whether the recipe asks for activation checkpointing."""

    @property
    def always(self) -> int:
        """What is there all the time."""
        return self.weights + self.copies + self.moments + self.buckets

    def peak(self, checkpointed: bool | None = None) -> int:
        """The most bytes at one time; null: as the recipe says."""
        chosen = self.checkpoints if checkpointed is None else checkpointed
        return self.always + (self.checkpointed if chosen else self.plain).peak

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk: weights and moments; recipe and tokenizers not counted."""
        return self.weights + self.moments


@dataclass(frozen=True)
class _Run:
    """What a step on fake tensors tells."""

    step: StepMemory
    weights: int
    copies: int
    gradients: int
    groups: tuple[Group, ...]


def estimate_memory(
    recipe: Recipe, labels: Labels, device: Device = "gpu", devices: int = 1
) -> tuple[Memory, tuple[Group, ...]]:
    """The memory of a training step, and the routing groups that it met.

    Args:
        recipe: the run; its micro-batch is taken with texts of the greatest length.
        labels: what the head of a task chooses from.
        device: kind of device.
        devices: how many share a step; with fewer than micro-batches, gradients are there from the second one on.
    """
    own = recipe.batch.num_micro // devices
    waiting = trained_parameters(recipe, labels) if own > 1 else ()
    plain, checkpointed = (_run(_with_checkpointing(recipe, on), labels, device, waiting, own) for on in (False, True))
    memory = Memory(
        device=device,
        weights=plain.weights,
        copies=plain.copies,
        gradients=plain.gradients,
        moments=2 * plain.gradients,
        buckets=plain.gradients if devices > 1 else 0,
        plain=plain.step,
        checkpointed=checkpointed.step,
        checkpoints=recipe.train.activation_checkpointing,
    )
    return memory, plain.groups


def _with_checkpointing(recipe: Recipe, on: bool) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"activation_checkpointing": on})})


def _run(recipe: Recipe, labels: Labels, device: Device, waiting: Collection[str], own: int) -> _Run:
    """Forward and backward of one of the device's `own` micro-batches; the gradients of the parameters `waiting` are
    there already."""
    objective = build_on_meta(recipe, labels, device)
    native = device == "gpu" and recipe.train.precision == "bf16"
    with FakeTensorMode():
        make_fake(objective, recipe)
        before = _gradients_of_before(objective, waiting)
        tensors = [*objective.parameters(), *objective.buffers()]
        live = LiveBytes([*tensors, *before], partial(_expert_scratch, native))
        _name_parts(objective, live)
        with live:
            live.part = INPUTS
            batches = fake_batches(recipe, _micro_batch(recipe))
            live.part = HEADS
            loss, total = forward(recipe, objective, batches)
            kept = live.alive.copy()
            live.part = BACKWARD
            total.backward()  # type: ignore[no-untyped-call]
    others = (own - 1) * kept[INPUTS]
    copies = sum(buffer.nbytes for name, buffer in objective.named_buffers() if name.endswith(".copy"))
    return _Run(
        step=StepMemory(
            inputs=kept[INPUTS] + others,
            encoder=kept[ENCODER],
            sparse=kept[SPARSE],
            heads=kept[HEADS],
            peak=live.peak + others + _bytes(before),
        ),
        weights=_bytes(tensors) - copies,
        copies=copies,
        gradients=_bytes(p.grad for p in objective.parameters() if p.grad is not None),
        groups=groups_of(loss, recipe.batch.num_micro),
    )


def _micro_batch(recipe: Recipe) -> dict[StreamName, int]:
    return {stream: recipe.batch.micro.of(stream) for stream in streams_of(recipe)}


def _gradients_of_before(objective: nn.Module, trained: Collection[str]) -> list[Tensor]:
    """Gradients that another micro-batch has left."""
    parameters = [parameter for name, parameter in objective.named_parameters() if name in trained]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


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


class _Sizes(NamedTuple):
    """Of a call of the experts' operator."""

    rows: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    element: int
    """Bytes of a number."""


def _expert_scratch(native: bool, func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the experts' operator takes for itself: torch's grouped kernel (`native`, if the widths allow it), or
    one product an expert.

    Read from vlmoe_core/moe/native.py and by_expert.py.
    """
    if func.name() not in (EXPERTS, EXPERTS_BACKWARD):
        return 0
    x_TD, weight_TK, choice_N, _, up_EHD = args[:5]
    experts, hidden, dim = up_EHD.shape
    sizes = _Sizes(choice_N.shape[0], dim, hidden, experts, weight_TK.shape[1], x_TD.element_size())
    aligned = all(width * sizes.element % ALIGNMENT == 0 for width in (dim, hidden))
    numbers = _grouped if native and aligned else _by_expert
    return numbers(sizes, func.name() == EXPERTS_BACKWARD) * sizes.element


def _grouped(sizes: _Sizes, backward: bool) -> int:
    """Numbers that torch's grouped kernel and what surrounds it take."""
    return sizes.rows * (sizes.dim + (2 if backward else 1) * sizes.hidden)


def _by_expert(sizes: _Sizes, backward: bool) -> int:
    """Numbers of one product an expert: what all of them write, and what one of them holds."""
    whole = sizes.rows * sizes.dim * ((sizes.top_k > 1) + backward)
    return whole + -(-sizes.rows // sizes.experts) * (sizes.dim + sizes.hidden) * (1 + backward)
