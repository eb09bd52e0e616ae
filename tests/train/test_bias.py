"""Loss-free balancing in training."""

from pathlib import Path

import pytest
import torch

from tests.train.support import tiny
from vlmoe_core.model.block import Routed
from vlmoe_core.moe.plan import make_plan
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.bias import RouterBiases
from vlmoe_core.train.build import build_objective


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    return tiny(tmp_path, "model.moe.vision.router={name: bias-balanced, update_rate: 0.25}")


def routed(experts: list[int], pool: str = "vision", layer: int = 1) -> Routed:
    """A plan that sends a token to each of these experts."""
    logits = torch.nn.functional.one_hot(torch.tensor(experts), 4).float()
    plan = make_plan(logits, logits, top_k=1, weights="gate", priority="gate", capacity=1, noise_std=0.0)
    return Routed(layer, pool, plan, len(experts))


def test_the_update_counts_all_micro_batches_and_dropped_tokens(loaded: LoadedRecipe) -> None:
    objective = build_objective(loaded.recipe, None)
    biases = RouterBiases(objective)
    (router,) = biases.routers.values()
    biases.add([routed([0, 0, 0, 1]), routed([3, 3], pool="text", layer=0)])
    biases.add([routed([0, 2, 2, 1])])
    biases.update()  # 4, 2, 2 and 0 choices: 2 on average
    assert router.bias.tolist() == [-0.25, 0, 0, 0.25]
    biases.add([routed([3])])
    biases.update()  # the counts of the step before are gone
    assert router.bias.tolist() == [0, 0.25, 0.25, 0]


def test_a_step_without_update_is_forgotten(loaded: LoadedRecipe) -> None:
    biases = RouterBiases(build_objective(loaded.recipe, None))
    biases.add([routed([0, 0, 0])])
    biases.forget()
    biases.update()
    assert not any(router.bias.any() for router in biases.routers.values())


def test_frozen_routers_keep_their_biases(loaded: LoadedRecipe) -> None:
    train = loaded.recipe.train.model_copy(update={"freeze": ("routers",)})
    objective = build_objective(loaded.recipe.model_copy(update={"train": train}), None)
    biases = RouterBiases(objective)
    biases.add([routed([0, 0, 0, 1])])
    biases.update()
    assert not objective.get_buffer("encoder.blocks.1.ffn.vision.router.bias").any()


def test_the_biases_are_saved(loaded: LoadedRecipe) -> None:
    assert "encoder.blocks.1.ffn.vision.router.bias" in build_objective(loaded.recipe, None).state_dict()


def test_without_such_a_router_nothing_is_counted(tmp_path: Path) -> None:
    biases = RouterBiases(build_objective(tiny(tmp_path).recipe, None))
    biases.add([routed([0, 1])])
    assert not biases.routers and not biases.counts
