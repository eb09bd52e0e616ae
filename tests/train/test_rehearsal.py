"""The trial step and the shrunken model."""

import math
from pathlib import Path

import pytest
import torch

from tests.train.support import tiny
from tests.train.tasks_support import tuned
from vlmoe_core.errors import TokenizerError, TrainError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train import rehearsal
from vlmoe_core.train.rehearsal import count_parameters, shrunken_model, try_step
from vlmoe_core.train.stand_ins import NoiseTeacher
from vlmoe_core.train.trial import noise_inputs

LARGE = {
    "preset": "large",
    "moe": {"vision": {"num_experts": 64, "top_k": 5}, "text": {"num_experts": 3, "layers": [2]}},
}


def test_a_shrunken_model_keeps_its_structure() -> None:
    large = ModelConfig.model_validate(LARGE)
    small = shrunken_model(large)
    for name in ("layers", "vl_layers", "patch_size", "image_size", "max_text_length"):
        assert getattr(small, name) == getattr(large, name)
    assert (small.dim, small.heads, small.hidden) == (32, 2, 64)
    assert small.sparse_layers("vision") == large.sparse_layers("vision") and small.sparse_layers("text") == (2,)
    assert small.moe.vision is not None and (small.moe.vision.num_experts, small.moe.vision.top_k) == (5, 5)
    assert small.moe.text is not None and small.moe.text.num_experts == 3
    assert small.num_params(1000) < 20_000_000 < large.num_params(1000)


def test_a_shrunken_shared_pool_keeps_thresholds_that_fewer_experts_can_reach() -> None:
    losses = {"global_entropy": 0.1, "global_entropy_threshold": 3.0}
    shared = {"num_experts": 32, "router": "cosine", "vision_balance": losses, "text_balance": losses}
    large = ModelConfig.model_validate({"preset": "large", "expert_pool": "shared", "moe": {"shared": shared}})
    small = shrunken_model(large).moe.shared
    assert small is not None and (small.num_experts, small.router.name) == (4, "cosine")
    assert small.vision_balance.global_entropy_threshold == pytest.approx(math.log(4))


def test_a_small_model_is_not_made_larger() -> None:
    config = ModelConfig(layers=1, dim=8, heads=4, hidden=8, vl_layers=0, patch_size=4, image_size=8)
    assert shrunken_model(config) == config


def test_counting_takes_no_memory(tmp_path: Path) -> None:
    recipe = tiny(tmp_path).recipe
    found = count_parameters(recipe)
    assert (found.total, found.active) == (recipe.num_params(), recipe.num_active_params())
    assert found.active < found.total


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_in_every_precision(tmp_path: Path, precision: str) -> None:
    recipe = tiny(tmp_path, f"train.precision={precision}", "train.compile=true").recipe
    inputs = noise_inputs(recipe)
    assert 0 < try_step(recipe, inputs.visual, inputs.micro.batches) < 100


def test_a_teacher_on_the_hub_is_stood_in_for(tmp_path: Path) -> None:
    """It would be fetched: there is no such repository."""
    recipe = tiny(
        tmp_path,
        "model={preset: tiny, modality: vision, vl_layers: 0, layers: 1, patch_size: 4, image_size: 16}",
        "data={train: {image: [{source: scenes, size: 50, image_size: 16}]}}",
        "batch={size: {image: 4}, micro: {image: 2}}",
        "objective={name: vqkd, code_dim: 4, teacher: {model: ./absent, dim: 24}}",
    ).recipe
    inputs = noise_inputs(recipe)
    assert isinstance(inputs.teacher, NoiseTeacher) and inputs.visual is None
    loss = try_step(recipe, None, inputs.micro.batches, teacher=inputs.teacher)
    assert 0.5 < loss < 2.5  # the cosine to random features is about 0; 1 and the commitment are left
    with pytest.raises(TokenizerError, match="absent"):
        try_step(recipe, None, inputs.micro.batches)


def test_active_parameters_of_a_task_count_its_head(tmp_path: Path) -> None:
    recipe = tuned(tmp_path, "classification").recipe
    few, many = (count_parameters(recipe, Labels(tuple(map(str, range(n))))) for n in (2, 5))
    assert many.total - few.total == many.active - few.active == 3 * (recipe.model.dim + 1)
    assert few.total - few.active == recipe.num_params() - recipe.num_active_params() > 0


def test_what_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(tmp_path).recipe
    inputs = noise_inputs(recipe)
    build = rehearsal.build_objective

    def broken(*arguments: object) -> torch.nn.Module:
        objective = build(*arguments)  # type: ignore[arg-type]
        torch.nn.init.constant_(objective.heads.text.bias, float("nan"))
        return objective

    monkeypatch.setattr(rehearsal, "build_objective", broken)
    with pytest.raises(TrainError, match="not finite in mlm, vlm_text;"):
        try_step(recipe, inputs.visual, inputs.micro.batches)
