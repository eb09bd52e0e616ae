"""Recipes of runs whose start is a run that nobody has made yet."""

import shutil
from pathlib import Path

import pytest

from tests.train.support import tiny, train
from vlmoe_core.errors import RecipeError, UsageError
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.train.folder import default_folder
from vlmoe_core.train.init import load_planned_recipe, load_run_recipe


@pytest.fixture(autouse=True)
def nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_run_of_a_shipped_recipe_is_stood_in_for_by_the_recipe() -> None:
    planned = load_planned_recipe("quickstart/vqa")
    base = load_recipe("quickstart/pretrain").recipe
    assert planned.loaded.recipe.model == base.model and planned.loaded.recipe.tokenizers == base.tokenizers
    assert planned.start == (
        "runs/quickstart-pretrain is not there; shipped recipes give its model: quickstart/pretrain"
    )
    with pytest.raises(UsageError, match="init: no checkpoint at runs/quickstart-pretrain"):
        load_run_recipe("quickstart/vqa")


def test_a_chain_is_followed_and_every_link_has_its_say(tmp_path: Path) -> None:
    """max_text_length and experts are of the first, the image size of the second, drop_path of the third."""
    planned = load_planned_recipe("paper/flickr30k-retrieval", ["model={drop_path: 0.3}", "data.max_text.pair=40"])
    model = planned.loaded.recipe.model
    first = load_recipe("paper/base-32e").recipe.model
    assert (model.image_size, model.drop_path) == (384, 0.3) and first.image_size == 224
    assert model.model_copy(update={"image_size": 224, "drop_path": 0.1}) == first
    assert planned.start is not None and planned.start.endswith(": paper/coco-retrieval, over paper/base-32e")


def test_a_run_that_is_there_beats_the_shipped_recipe(tmp_path: Path) -> None:
    folder = train(tiny(tmp_path, "train.steps=1", "train.eval_examples=1", "optim.warmup_steps=1"), None).folder
    shutil.copytree(folder, default_folder("quickstart/pretrain"))
    planned = load_planned_recipe("quickstart/nli", ["data.max_text.text=24"])
    assert planned.start is None and planned.loaded.recipe.model.dim == 16
    assert planned.loaded == load_run_recipe("quickstart/nli", ["data.max_text.text=24"])


def test_what_starts_from_nothing_is_loaded_as_ever() -> None:
    for name in ("quickstart/pretrain", "finetune/easy-vqa"):
        planned = load_planned_recipe(name)
        assert planned.start is None and planned.loaded == load_recipe(name)


def test_any_other_run_must_be_there() -> None:
    with pytest.raises(UsageError, match=r"init: no checkpoint at runs/mine: .* pretrain it first"):
        load_planned_recipe("quickstart/vqa", model=Path("runs/mine"))
    with pytest.raises(RecipeError, match=r"model\.dim is 32, but 64 in runs/quickstart-pretrain"):
        load_planned_recipe("quickstart/vqa", ["model.dim=32"])


def test_the_default_folder_of_a_run() -> None:
    assert default_folder("paper/base-32e") == Path("runs/paper-base-32e") and default_folder("my") == Path("runs/my")
