"""The estimate against the tensors that are really alive in a step, followed here by other means than there."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.analysis.estimate.support import (
    EXPERTS,
    MODEL,
    Storages,
    memory_recipe,
    real_batches,
    recipe_of,
    tensors_of,
    tokenizer_recipe,
)
from vlmoe_core.analysis.estimate.fake import Device
from vlmoe_core.analysis.estimate.memory import Memory, follow_steps, memory_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.moe.peak import peak_bytes
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.parallel import hold_expert_copies, refresh_expert_copies


class Training:
    """Real steps of a recipe on a device."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.recipe, self.device = recipe, device
        self.objective = build_objective(recipe, None).to(device).train()
        self.optimizer = build_optimizer(self.objective, recipe.optim, recipe.model.layers)
        hold_expert_copies(self.objective, recipe.train)
        self.micros = [
            {s: batch.to(device) for s, batch in real_batches(recipe).items()} for _ in range(recipe.batch.num_micro)
        ]
        self.step()  # makes the moments
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()

    def micro_batch(self, batches: dict[StreamName, Batch]) -> None:
        """Forward and backward."""
        low = self.recipe.train.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16, enabled=low):
            loss = self.objective(batches)
        loss.total(self.objective.counts(batches)).backward()  # type: ignore[operator]

    def step(self) -> None:
        """All micro-batches, clipping, AdamW."""
        for batches in self.micros:
            self.micro_batch(batches)
        nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        refresh_expert_copies(self.objective)

    def always(self) -> list[Tensor]:
        """Weights, copies, moments and the micro-batches."""
        moments = [v for state in self.optimizer.state.values() for v in state.values()]
        return [*self.objective.parameters(), *self.objective.buffers(), *moments, *self.inputs()]

    def inputs(self) -> list[Tensor]:
        """The micro-batches."""
        return [value for batches in self.micros for batch in batches.values() for value in tensors_of(batch)]

    def peak(self) -> int:
        """The most bytes of tensors in a step, as operators return them."""
        with Storages() as seen:
            for tensor in self.always():
                seen.see(tensor)
            self.step()
        return seen.peak

    def peak_of_allocator(self) -> int:
        """The most bytes that torch's allocator gave out in a step, insides of operators and all."""
        return peak_bytes(self.step, lambda: []) + sum(tensor.nbytes for tensor in self.always())


def estimated(recipe: Recipe, device: Device = "cpu", world: int = 1) -> Memory:
    return memory_of(recipe, NO_LABELS, device, follow_steps(recipe, NO_LABELS, device, world))


@pytest.mark.parametrize(
    ("moe", "precision"), [({}, "fp32"), (EXPERTS, "fp32"), (EXPERTS, "bf16")], ids=["dense", "sparse", "sparse-bf16"]
)
def test_the_peak_of_a_real_step(moe: dict[str, Any], precision: str) -> None:
    memory = estimated(memory_recipe(precision, False, moe=moe))
    for checkpointing in (False, True):
        training = Training(memory_recipe(precision, checkpointing, moe=moe))
        seen = training.peak()
        assert memory.peak(checkpointing) == pytest.approx(seen, rel=0.05)
        assert memory.peak(checkpointing) == pytest.approx(training.peak_of_allocator(), rel=0.05)
        assert memory.peak(not checkpointing) != pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize(
    "recipe",
    [
        memory_recipe("bf16", True, attention="per_modality", norm="per_modality", patch_embed="conv", layer_scale=0.1),
        memory_recipe("fp32", False, positions="relative"),
        tokenizer_recipe(),
    ],
    ids=["per modality", "relative", "visual tokenizer"],
)
def test_other_steps(recipe: Recipe) -> None:
    assert estimated(recipe).peak() == pytest.approx(Training(recipe).peak(), rel=0.05)


def test_several_micro_batches_and_what_is_always_there() -> None:
    recipe = memory_recipe("bf16", False, num_micro=3, moe=EXPERTS)
    memory, training = estimated(recipe), Training(recipe)
    objective = training.objective
    copies = [buffer for name, buffer in objective.named_buffers() if name.endswith(".copy")]
    assert memory.weights == sum(parameter.nbytes for parameter in objective.parameters())
    assert memory.copies == sum(buffer.nbytes for buffer in copies) > 0
    assert memory.moments == sum(v.nbytes for s in training.optimizer.state.values() for v in s.values() if v.dim())
    assert memory.plain.inputs == sum(tensor.nbytes for tensor in training.inputs())
    assert memory.peak() == pytest.approx(training.peak(), rel=0.05)
    training.micro_batch(training.micros[0])
    assert memory.gradients == sum(p.grad.nbytes for p in objective.parameters() if p.grad is not None)


def test_parts_and_processes() -> None:
    recipe = memory_recipe("fp32", False, num_micro=2, moe=EXPERTS)
    alone, shared = estimated(recipe), estimated(recipe, world=2)
    assert alone.buckets == 0 and shared.buckets == shared.gradients
    assert alone.plain.peak > shared.plain.peak  # no gradient waits where each device has one micro-batch
    assert alone.plain.inputs == 2 * shared.plain.inputs > 0
    assert shared.plain.sparse > 10 * shared.checkpointed.sparse > 0  # of those the plans alone are kept
    assert shared.plain.activations > 2 * shared.checkpointed.activations
    logits = 8 * (7 + 15) * 1500 + 2 * 8 * 26 * 800
    assert 4 * logits <= shared.plain.heads < 1.2 * 4 * logits


def test_only_bf16_has_a_grouped_kernel_on_a_gpu() -> None:
    model = {"layers": 1, "vl_layers": 0, "moe": EXPERTS}
    grouped, by_expert = (estimated(memory_recipe(name, False, **model), "gpu") for name in ("bf16", "fp16"))
    assert grouped.plain.activations == by_expert.plain.activations and grouped.peak(True) > by_expert.peak(True)


@pytest.mark.parametrize("stream", ["image", "text"])
def test_what_one_stream_alone_does_not_pass_has_gradients_and_moments_too(stream: Any) -> None:
    """The run's other streams are empty batches, which touch their parameters with zeros."""
    memory = estimated(recipe_of(MODEL, streams=(stream,), num_micro=2, max_text={"text": 64, "pair": 64}))
    assert memory.gradients == memory.weights and memory.moments == 2 * memory.gradients


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("moe", [{}, EXPERTS], ids=["dense", "sparse"])
def test_the_peak_on_a_gpu(moe: dict[str, Any], precision: str, checkpointing: bool) -> None:
    recipe = memory_recipe(precision, checkpointing, moe=moe)
    training = Training(recipe, "cuda")
    outside = torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in training.always())
    torch.cuda.reset_peak_memory_stats()
    training.step()
    torch.cuda.synchronize()
    assert estimated(recipe, "gpu").peak() == pytest.approx(torch.cuda.max_memory_allocated() - outside, rel=0.15)
