"""Formulas against torch's counter, which sees every product: on the meta device, so that no product is computed."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.analysis.estimate.support import real_batch, recipe_of, tokenizer_recipe
from tests.model.support import VLMO
from vlmoe_core.analysis.estimate.flops import example_flops, step_flops
from vlmoe_core.analysis.estimate.inputs import blank_batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.config import PRESETS
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.dense import DenseFFN
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.train.build import build_objective

EXAMPLES = 2
EXPERTS: dict[str, Any] = {"vision": {"num_experts": 8}, "text": {"num_experts": 8}}


def on_meta(recipe: Recipe) -> torch.nn.Module:
    with torch.device("meta"):
        return build_objective(recipe, None).train()


def counted(objective: torch.nn.Module, recipe: Recipe, stream: StreamName) -> tuple[float, float]:
    """Of one example: the forward pass, and forward and backward."""
    with torch.device("meta"):
        batches = {stream: blank_batch(recipe, stream, EXAMPLES)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total = objective(batches).total(objective.counts(batches))  # type: ignore[operator]
        forward = counter.get_total_flops()
        total.backward()
    return forward / EXAMPLES, counter.get_total_flops() / EXAMPLES


def counted_layer(layer: torch.nn.Module, x_TD: torch.Tensor) -> tuple[int, int]:
    """Forward, and forward and backward."""
    with FlopCounterMode(display=False) as counter:
        found = layer(x_TD)
        forward = counter.get_total_flops()
        (found[0] if isinstance(found, tuple) else found).sum().backward()
    return forward, counter.get_total_flops()


def test_a_dense_and_a_sparse_network_are_counted_alike() -> None:
    tokens, dim, hidden, experts = 24, 16, 40, 4
    with torch.device("meta"):
        dense = DenseFFN(dim, hidden)
        sparse = SparseFFN(dim, hidden, MoEConfig(num_experts=experts, router="softmax", balance={}), 0.02)  # type: ignore[arg-type]
        x_TD = torch.randn(tokens, dim, requires_grad=True)
    forward, both = counted_layer(dense, x_TD)
    assert (forward, both) == (4 * tokens * dim * hidden, 12 * tokens * dim * hidden)
    router = 2 * tokens * dim * experts
    assert counted_layer(sparse, x_TD) == (forward + router, both + 3 * router)


@pytest.mark.parametrize(
    ("preset", "moe"), [*((preset, EXPERTS) for preset in PRESETS), ("tiny", {})]
)  # every second block of the sparse ones is dense
def test_every_preset_and_stream(preset: str, moe: dict[str, Any]) -> None:
    recipe = recipe_of({"preset": preset, "moe": moe})
    objective = on_meta(recipe)
    for stream, estimated in example_flops(recipe, NO_LABELS).items():
        forward, both = counted(objective, recipe, stream)
        assert estimated.forward == pytest.approx(forward, rel=0.002)
        assert estimated.total == pytest.approx(both, rel=0.002)
        assert estimated.recompute == 0 and estimated.heads is not None and 0 < estimated.heads < estimated.forward


@pytest.mark.parametrize(
    "model",
    [
        {"moe": EXPERTS},
        {"moe": EXPERTS, "drop_path": 0.0},
        {"drop_path": 0.0, "vl_layers": 0, "patch_embed": "conv"},
        {"drop_path": 0.0, "moe": {"vision": {"num_experts": 3, "layers": [0, 1], "shared_expert": True, "top_k": 2}}},
        {"expert_pool": "shared", "moe": {"shared": {"num_experts": 4}}, "drop_path": 0.0},
        {**VLMO, "drop_path": 0.0},
    ],
)
def test_what_checkpointing_computes_once_more(model: dict[str, Any]) -> None:
    for checkpointing in (False, True):
        recipe = recipe_of({"preset": "tiny", "layers": 2, **model}, train={"activation_checkpointing": checkpointing})
        objective = on_meta(recipe)
        for stream, estimated in example_flops(recipe, NO_LABELS).items():
            assert bool(estimated.recompute) == checkpointing
            assert estimated.total == pytest.approx(counted(objective, recipe, stream)[1], rel=0.002)


def test_contrast_encodes_images_and_texts_alone_as_well() -> None:
    weights = {"mim": 0, "mlm": 0, "vlm_text": 0, "vlm_image": 0, "itc": 1.0}
    both = recipe_of({"preset": "tiny", "layers": 2}, objective={"name": "masked", "weights": {"itc": 1.0}})
    alone = recipe_of({"preset": "tiny", "layers": 2}, objective={"name": "masked", "weights": weights})
    for recipe in (both, alone):
        forward, total = counted_on_cpu(recipe, "pair")
        estimated = example_flops(recipe, NO_LABELS)["pair"]
        assert estimated.forward == pytest.approx(forward, rel=0.002)
        assert estimated.total == pytest.approx(total, rel=0.002)
    assert estimated.heads == 2 * 2 * 128**2  # a linear map of each of the two [CLS]


def counted_on_cpu(recipe: Recipe, stream: StreamName) -> tuple[float, float]:
    """As `counted`, where the meta device does not serve: it has no autocast, which some heads switch off."""
    objective = build_objective(recipe, None).train()
    batches = {stream: real_batch(recipe, stream)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total = objective(batches).total(objective.counts(batches))  # type: ignore[operator]
        forward = counter.get_total_flops()
        total.backward()
    return forward / EXAMPLES, counter.get_total_flops() / EXAMPLES


def test_a_visual_tokenizer_in_training() -> None:
    forward, total = counted_on_cpu(tokenizer_recipe(), "image")
    estimated = example_flops(tokenizer_recipe(), NO_LABELS)["image"]
    assert estimated.forward == pytest.approx(forward, rel=0.002)
    assert estimated.total == pytest.approx(total, rel=0.002)


def test_a_step_is_all_its_examples() -> None:
    recipe = recipe_of({"preset": "tiny"}, micro=2, num_micro=3)
    flops = example_flops(recipe, NO_LABELS)
    assert step_flops(recipe, flops) == 6 * sum(one.total for one in flops.values())
