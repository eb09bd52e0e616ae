"""Routing figures of a run's own evaluations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.analysis.codes.support import random_tokenizer
from tests.train.support import metrics, tiny, train
from vlmoe_core.analysis.routing.request import tasks_of
from vlmoe_core.analysis.routing.watch import watch_routing
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.build import build_dataset, build_objective
from vlmoe_core.train.trained import Trained, load_trained

NAMES = ("dropped", "entropy", "confidence", "gini")


def first_group(trained: Trained) -> MicroBatch:
    recipe = trained.recipe
    return build_dataset(recipe, recipe.data.eval, trained.tokenizers, training=False)[0]


def figures_of(objective: nn.Module, recipe: Recipe, batches: Any) -> dict[str, float]:
    with torch.no_grad(), watch_routing(objective, recipe) as figures:
        objective(batches)
    return dict(figures())


def test_figures_are_means_over_the_layers_of_what_the_plans_say(trained: Trained) -> None:
    batches = first_group(trained).batches
    found = figures_of(trained.objective, trained.recipe, batches)
    with torch.no_grad():
        routed = trained.objective(batches).routed
    tasks = {"image": "mim", "text": "mlm", "pair": "vlm"}
    assert set(found) == {f"routing/{tasks[stream]}/{one.pool}/{name}" for stream, one in routed for name in NAMES}
    entropies = [
        float(torch.special.entr(one.plan.probs_TE.double()).sum(1).mean())
        for stream, one in routed
        if stream == "image" and one.pool == "vision"
    ]
    assert found["routing/mim/vision/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-6)
    assert 0 <= found["routing/mim/vision/gini"] < 1 and found["routing/mim/vision/dropped"] == 0


def test_nothing_is_left_on_the_model(trained: Trained) -> None:
    hooks = len(trained.objective.encoder._forward_hooks)  # type: ignore[union-attr, arg-type]
    figures_of(trained.objective, trained.recipe, first_group(trained).batches)
    assert len(trained.objective.encoder._forward_hooks) == hooks  # type: ignore[union-attr, arg-type]


def test_a_visual_tokenizer_with_an_encoder_takes_no_part(trained: Trained) -> None:
    batches = first_group(trained).batches
    before = figures_of(trained.objective, trained.recipe, batches)
    visual = random_tokenizer()
    objective = build_objective(trained.recipe, visual)
    objective.load_state_dict(trained.objective.state_dict())
    found = figures_of(objective.eval(), trained.recipe, batches)
    assert found == before and found
    assert sum(isinstance(module, Encoder) for module in objective.modules()) == 2


def test_an_objective_with_two_encoders_has_no_figures(trained: Trained) -> None:
    both = nn.ModuleList([trained.objective, load_trained(trained.path).objective])
    with watch_routing(both, trained.recipe) as figures:
        pass
    assert figures() == {}


def test_views_for_contrast_are_no_masked_modelling(tmp_path: Path) -> None:
    """With contrast alone nothing is masked, so there is nothing to count."""
    weights = "objective.weights={mlm: 0, mim: 0, vlm_text: 0, vlm_image: 0, itc: 1}"
    whole = "batch.micro={image: 4, text: 4, pair: 4}"
    folder = train(tiny(tmp_path, "train.steps=2", weights, whole), tmp_path / "out").folder
    alone = load_trained(folder)
    assert figures_of(alone.objective, alone.recipe, first_group(alone).batches) == {}
    assert tasks_of(alone.recipe) == {"image": "mim", "text": "mlm", "pair": "vlm"}
    assert metrics(folder)
