"""A recipe's objective and micro-batch on fake tensors: shapes without numbers, neither memory nor arithmetic.

Fake tensors lie on the CPU, as a torch without CUDA can make no others. What a GPU does otherwise is put in its place:
attention in the precision of the run.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from vlmoe_core.analysis.estimate.inputs import blank_batch, pictures_of, repeated, streams_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.attention import Attention, ModalityAttention
from vlmoe_core.moe.experts import Experts
from vlmoe_core.objectives.kinds.vqkd import VQKDTraining
from vlmoe_core.objectives.loss import Loss
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.kinds.retrieval import Matching
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.mesh import ALONE, Mesh
from vlmoe_core.train.parallel import LOW_DTYPES, hold_expert_copies
from vlmoe_core.train.stand_ins import NoiseTeacher
from vlmoe_core.train.wrapping import cut_weights, shared_out

Device = Literal["gpu", "cpu"]
FEW = 2
"""Examples of a stream where their number does not matter; retrieval compares each with another."""


def _as_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The fused kernel in the precision of its inputs; a CPU's attention is in float32."""
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def build_on_meta(recipe: Recipe, labels: Labels, device: Device = "gpu", mesh: Mesh = ALONE) -> nn.Module:
    """The objective in training mode on the meta device, whose attention computes as on such a device.

    Experts of all implementations compute as `grouped`: the others have shapes that depend on numbers. Of experts that
    processes share, those of this process are there.
    """
    with torch.device("meta"), shared_out(mesh):
        objective = build_objective(recipe, None, labels)
        if isinstance(objective, Matching):
            objective = _FixedNegatives(objective.config, objective.encoder)
    if isinstance(objective, VQKDTraining):
        teacher = objective.config.teacher
        objective.teacher = NoiseTeacher(teacher.width(recipe.model.patch_size), recipe.model.num_patches)
    for module in list(objective.modules()):
        if isinstance(module, Experts):
            _group(module)
        if isinstance(module, Attention | ModalityAttention) and device == "gpu":
            module.kernel = _as_on_a_gpu
    return objective.train()


def _group(experts: Experts) -> None:
    """Compute as `grouped`, which has no sub-norm: its parameters stay, and their gradients, but not its arithmetic."""
    experts.implementation = "grouped"
    if experts.norm is not None:
        experts.add_module("unused", experts.norm)
        experts.norm = None
        experts.register_forward_hook(_with_unused)


def _with_unused(experts: nn.Module, inputs: tuple[Any, ...], y_TD: Tensor) -> Tensor:
    return y_TD + sum(parameter.sum() for parameter in experts.get_submodule("unused").parameters())


def make_fake(objective: nn.Module, recipe: Recipe, mesh: Mesh = ALONE) -> None:
    """Turn an objective of the meta device into fake tensors, cut or with expert copies, as the processes of the mesh
    hold it; called inside `FakeTensorMode`."""
    # Module.to_empty would compute with the meta tensors, which are not fake; here their shapes alone are read.
    objective._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))  # type: ignore[no-untyped-call]
    if mesh.world is not None and mesh.shard == "full":
        cut_weights(objective, mesh, LOW_DTYPES.get(recipe.train.precision))
    else:
        hold_expert_copies(objective, recipe.train)


def fake_batches(recipe: Recipe, examples: Mapping[StreamName, int]) -> dict[StreamName, Batch]:
    """A micro-batch of so many examples of each stream, texts of the greatest length.

    In pretraining a stream that the run does not have is an empty batch, as in the run itself.
    """
    streams = STREAMS if recipe.task is None else streams_of(recipe)
    return {stream: blank_batch(recipe, stream, examples.get(stream, 0), pictures_of(recipe)) for stream in streams}


def forward(recipe: Recipe, objective: nn.Module, batches: Mapping[StreamName, Batch]) -> tuple[Loss, Tensor]:
    """The loss of a micro-batch in the recipe's precision, and its weighted total."""
    low = LOW_DTYPES.get(recipe.train.precision)
    with torch.autocast("cpu", low, enabled=low is not None):
        loss: Loss = objective(batches)
    counts: Callable[..., Mapping[str, int]] = objective.counts  # type: ignore[assignment]
    return loss, loss.total(counts(batches))


def trained_parameters(recipe: Recipe, labels: Labels) -> tuple[str, ...]:
    """The names of the parameters that a micro-batch gives a gradient."""
    objective = build_on_meta(recipe, labels)
    with FakeTensorMode():
        make_fake(objective, recipe)
        _, total = forward(recipe, objective, fake_batches(recipe, dict.fromkeys(streams_of(recipe), FEW)))
        total.backward()  # type: ignore[no-untyped-call]
    return tuple(name for name, parameter in objective.named_parameters() if parameter.grad is not None)


class _FixedNegatives(Matching):
    """Retrieval with twice as many false pairs as true ones, which ones does not matter."""

    def _num_judged(self, pairs: Batch) -> int | None:
        return 3 * pairs.num_examples if self.config.itm_weight else None

    def _with_negatives(self, pairs: Batch, image_XD: Tensor, text_XD: Tensor) -> Batch:
        return repeated(pairs, 3)
