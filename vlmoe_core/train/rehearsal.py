"""One optimiser step on a CPU, of the recipe's own model or of a shrunken one, to see that everything fits together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import TrainError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS, Labels
from vlmoe_core.tokenizers.teachers.teacher import Teacher
from vlmoe_core.tokenizers.visual import VisualTokenizer
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.parallel import hold_expert_copies, refresh_expert_copies

MOST_PARAMETERS = 50_000_000
"""A model with more parameters is shrunk for the trial step: AdamW needs 16 bytes for each."""
SMALL_DIM = 32
MOST_HEADS = 2
MOST_EXPERTS = 4


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of an objective, heads included."""

    total: int
    """All of them."""
    active: int
    """Those that a token of each modality uses; see `ModelConfig.num_active_params`."""


def count_parameters(recipe: Recipe, labels: Labels = NO_LABELS) -> Parameters:
    """The parameters of the recipe's model, built on the meta device: no memory, no arithmetic."""
    with torch.device("meta"):
        objective = build_objective(recipe, None, labels)
    total, idle = sum(p.numel() for p in objective.parameters()), recipe.num_params() - recipe.num_active_params()
    return Parameters(total, total - idle)


def shrunken_model(config: ModelConfig) -> ModelConfig:
    """The same blocks, patches and sparse layers, but narrow, with few heads and experts."""
    dim, heads = config.dim, config.heads
    if dim > SMALL_DIM:
        dim, heads = SMALL_DIM, min(heads, MOST_HEADS)
    values: dict[str, Any] = config.model_dump()
    for moe in values["moe"].values():
        if moe is not None:
            moe["num_experts"] = min(moe["num_experts"], max(MOST_EXPERTS, moe["top_k"]))
            moe["kept_experts"] = None
            for losses in (moe[key] for key in moe if key.endswith("balance")):
                for name in ("local_entropy_threshold", "global_entropy_threshold"):
                    if losses[name] is not None:  # fewer experts have less entropy
                        losses[name] = min(losses[name], math.log(moe["num_experts"]))
    return ModelConfig.model_validate(values | {"dim": dim, "heads": heads, "hidden": min(config.hidden, 2 * dim)})


def try_step(
    recipe: Recipe,
    visual: VisualTokenizer | None,
    batches: Mapping[StreamName, Batch],
    labels: Labels = NO_LABELS,
    teacher: Teacher | None = None,
) -> float:
    """Forward, backward, clipping and AdamW on one micro-batch, on the CPU; returns the loss before the update.

    Accelerate is left out: it would fix the device and precision of this process for good. fp16, which needs a GPU,
    runs in float32; nothing is compiled.

    Args:
        recipe: the run.
        visual: the visual tokenizer, where one is asked for.
        batches: the micro-batch.
        labels: what the head of a task chooses from.
        teacher: stands in for the one that the objective learns from; null: none does.

    Raises:
        TrainError: the loss or the gradient is not finite.
    """
    objective: Any = build_objective(recipe, visual, labels)
    if teacher is not None:
        objective.teacher = teacher
    optimizer = build_optimizer(objective, recipe.optim, recipe.model.layers)
    lowers = recipe.train.precision == "bf16"
    if lowers:
        hold_expert_copies(objective, recipe.train)
    objective.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=lowers):
        loss = objective(batches)
        total = loss.total(objective.counts(batches))
    total.backward()
    norm = float(nn.utils.clip_grad_norm_(objective.parameters(), recipe.optim.clip_norm or math.inf))
    _require_finite({name: float(part.sum.detach()) for name, part in loss.parts.items()}, norm)
    optimizer.step()
    refresh_expert_copies(objective)
    return float(total.detach())


def _require_finite(losses: Mapping[str, float], grad_norm: float) -> None:
    broken = [name for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        raise TrainError(
            f"the first step's loss is not finite in {', '.join(broken)}; lower model.init_std, or use fp32"
        )
    if not math.isfinite(grad_norm):
        raise TrainError(
            "the first step's gradient is not finite although the loss is; lower model.init_std, or use fp32"
        )
