import pytest

from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.build import build_objective


def recipe_of(**data: object) -> Recipe:
    scenes = [{"source": "scenes"}]
    values = {
        "model": {"preset": "tiny", "moe": {"text": {"num_experts": 4}}},
        "tokenizers": {"text": {"vocab_size": 300}, "visual": {"codebook_size": 64}},
        "data": {"train": {"image": scenes, "pair": scenes}, "max_text": {"text": 100, "pair": 40}, **data},
        "objective": {"name": "masked"},
        "batch": {"size": {"image": 4, "pair": 4}, "micro": {"image": 4, "pair": 4}},
        "train": {"steps": 1},
    }
    return Recipe.model_validate(values)


def test_a_recipe_knows_the_size_of_its_objective() -> None:
    recipe = recipe_of()
    built = sum(p.numel() for p in build_objective(recipe, None).parameters())
    assert recipe.num_params() == built
    assert recipe.num_active_params() == built - 2 * 3 * (128 * 512 * 2 + 512 + 128)


def test_flops_of_a_recipe_take_the_greatest_text() -> None:
    recipe, padded = recipe_of(), recipe_of(pad_text_to=64)
    assert recipe.flops("image") == recipe.model.flops(65, 0) == padded.flops("image")
    assert recipe.flops("text") == recipe.model.flops(0, 100) == padded.flops("text")
    assert recipe.flops("pair") == recipe.model.flops(65, 40)
    assert padded.flops("pair") == recipe.model.flops(65, 64)


def test_padding_beyond_the_position_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.pad_text_to \(200\) is more than model\.max_text_length \(128\)"):
        recipe_of(pad_text_to=200)


def test_a_recipe_that_learns_nothing_is_refused() -> None:
    values = recipe_of().model_dump()
    images = {
        "batch": {"size": {"image": 4}, "micro": {"image": 4}},
        "data": {"train": {"image": [{"source": "scenes"}]}},
    }
    silent = {"objective": {"name": "masked", "weights": {"mim": 0, "itc": 1}}}
    with pytest.raises(ValueError, match=r"every loss of what is read \(image\) has weight 0, and contrast \(itc\)"):
        Recipe.model_validate({**values, **images, **silent})
    assert Recipe.model_validate({**values, **silent}).num_params() > 0
