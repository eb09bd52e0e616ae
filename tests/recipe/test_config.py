"""Values that no run could use are refused with the recipe."""

import pytest

from tests.train.support import RECIPE
from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.betas=[0.9, 1.5]", "optim.betas.1"),
        ("optim.min_lr=1", "min_lr"),
        ("data.workers=-1", "data.workers"),
        ("seed=99999999999999999999999", "seed"),
        ("model.moe.vision.layers={}", "layers is empty"),
        ("objective.weights.mlm=-1", "objective.weights.mlm"),
        ("train.steps=0", "train.steps"),
        ("mask.image_count=16", "mask.image_count"),
        ("data.pad_text_to=99", "data.pad_text_to"),
        ("parallel.expert=0", "parallel.expert"),
    ],
)
def test_a_value_out_of_bounds_is_one_line_that_names_it(tmp_path, override: str, message: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_words_that_do_not_go_together(tmp_path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    two = ["train.compile=true", "train.activation_checkpointing=true"]
    load_recipe(str(path), two)
    with pytest.raises(RecipeError, match=r"parallel\.expert above 1 don't go together.*leave one of them out"):
        load_recipe(str(path), [*two, "parallel.expert=2"])
    load_recipe("tokenizer/vqkd-tiny", ["parallel.expert=1"])
    with pytest.raises(RecipeError, match=r"parallel\.shard is full, but objective vqkd.*set it to none"):
        load_recipe("tokenizer/vqkd-tiny", ["parallel.shard=full"])
