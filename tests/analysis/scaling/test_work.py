"""What the formulas count is what a step on fake tensors counts."""

import pytest

from tests.analysis.estimate.support import recipe_of
from tests.analysis.scaling.support import MOE, bytes_alone, sparse_recipe
from vlmoe_core.analysis.estimate.estimate import Machine, estimate
from vlmoe_core.analysis.estimate.rehearsal import rehearse
from vlmoe_core.analysis.scaling.plan import Layout, Shard, predict
from vlmoe_core.analysis.scaling.work import Pass, work_of
from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.train.init import load_planned_recipe


def base() -> Recipe:
    return load_recipe("paper/base-32e").recipe


def test_the_sizes_of_the_paper() -> None:
    work, recipe = work_of(base()), base()
    assert work.dense + work.shared == recipe.num_params()
    assert work.layer == 32 * (768 * 3072 * 2 + 768 + 3072)
    assert (work.sparse, work.layers, work.experts, work.runs, work.capacity) == (12, 12, 32, 3, 1.25)
    # Pairs pass a VL-FFN in the top two blocks, of which one is sparse.
    images, texts, captions = 64 * 197, 64 * 128, 64 * recipe.data.max_text.pair
    assert work.passes == (
        Pass("vision", 6, images),
        Pass("text", 6, texts),
        Pass("vision", 5, images),
        Pass("text", 5, captions),
    )


def test_recomputation_is_not_useful() -> None:
    plain, again = (work_of(sparse_recipe(checkpointed=on)) for on in (False, True))
    assert plain.useful == plain.flops == again.useful < again.flops
    assert again.activations < plain.activations


@pytest.mark.parametrize(("text", "capacity"), [(2.0, 2.0), (1.0, 1.25), (None, None)])
def test_the_largest_capacity_bounds_the_busiest(text: float | None, capacity: float | None) -> None:
    moe = {"vision": MOE, "text": {**MOE, "capacity_factor": text}}
    assert work_of(sparse_recipe(moe=moe)).capacity == capacity


def test_choices_travel_as_often_as_there_are() -> None:
    rows = {one.pool: one.rows for one in work_of(sparse_recipe()).passes}
    recipe = sparse_recipe()
    assert rows["text"] == 2 * 4 * recipe.data.max_text.pair


@pytest.mark.parametrize(
    ("expert", "shard", "checkpointed"),
    [(1, "none", False), (4, "none", False), (4, "none", True), (1, "full", False), (4, "full", False)],
)
def test_bytes_on_the_wire_are_those_of_a_rehearsal(expert: int, shard: Shard, checkpointed: bool) -> None:
    """Predicted in closed form here; there a step of the real objective on fake tensors, each collective counted."""
    recipe = sparse_recipe(expert, shard, checkpointed)
    counted = {one.kind: one.even for one in rehearse(recipe, NO_LABELS, 8).traffic}
    step = predict(work_of(recipe), 1, Layout(8, expert, shard), bytes_alone(8), imbalance=1.0)
    tokens = counted.get("tokens", 0) + counted.get("counts", 0)
    assert step.exchange == pytest.approx(tokens, rel=0.02)
    assert step.sync == pytest.approx(counted.get("gradients", 0) + counted.get("experts", 0), rel=0.02)
    assert step.gather == pytest.approx(counted.get("gathered", 0) + counted.get("scattered", 0), rel=0.05)
    assert (step.exchange > 0, step.gather > 0) == (expert > 1, shard == "full")


@pytest.mark.parametrize("checkpointed", (False, True))
def test_activations_are_about_those_of_the_estimate(checkpointed: bool) -> None:
    """The slope: what more examples need. The estimate also knows what does not grow with them."""
    sizes = {"preset": "base", "layers": 4, "vl_layers": 1, "image_size": 112, "max_text_length": 64}
    found = []
    for micro in (2, 6):
        recipe = recipe_of(
            sizes,
            micro=micro,
            max_text={"text": 64, "pair": 64},
            train={"precision": "bf16", "activation_checkpointing": checkpointed},
        )
        memory = estimate(recipe, Machine()).memory
        step = memory.checkpointed if checkpointed else memory.plain
        found.append((work_of(recipe).activations, step.activations))
    formula, counted = (found[1][i] - found[0][i] for i in (0, 1))
    # With recomputation a block's activations come on top, while the backward pass is in it.
    assert 0.85 <= formula / counted <= (2.6 if checkpointed else 1.15)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="reckons with pretraining"):
        work_of(load_planned_recipe("paper/vqa").loaded.recipe)
    uneven = {"vision": {"num_experts": 4}, "text": {"num_experts": 8}}
    with pytest.raises(UsageError, match=r"as many experts in each layer, not \[4, 8\]"):
        work_of(recipe_of({"preset": "tiny", "moe": uneven}))


def test_a_dense_model_has_nothing_to_exchange() -> None:
    work = work_of(recipe_of({"preset": "tiny"}))
    assert (work.passes, work.shared, work.layer, work.capacity) == ((), 0, 0, None)
