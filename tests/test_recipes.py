"""Every recipe under recipes/ says what a user has to know, loads, and builds."""

from pathlib import Path

import pytest
import torch

from vlmoe_core.recipe.catalogue import Catalogue, head_comment
from vlmoe_core.recipe.load import LoadedRecipe, dump_recipe, load_recipe, read_recipe
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.init import load_run_recipe

CATALOGUE = Catalogue(Path(__file__).parents[1] / "recipes")
HEAD = ("Command:", "Hardware:", "Time:", "Expected:")
every_recipe = pytest.mark.parametrize("name", CATALOGUE.names())


def test_the_quick_start_is_among_them() -> None:
    assert "quickstart/pretrain" in CATALOGUE.names()


@every_recipe
def test_head_comment(name: str) -> None:
    path = CATALOGUE.path(name)
    assert path is not None
    head = head_comment(path.read_text("utf-8"))
    missing = [word for word in HEAD if not any(line.startswith(f"# {word}") for line in head.splitlines())]
    assert not missing, f"the head comment of {name} lacks {missing}"
    command = next(line for line in head.splitlines() if line.startswith("# Command:"))
    assert name in command, f"the command of {name} names another recipe"


def recipe_of_run(init: str) -> Path:
    """The shipped recipe whose run folder `init` names."""
    found = [name for name in CATALOGUE.names() if Path(init) == Path("runs") / name.replace("/", "-")]
    assert found, f"init: {init} is the run folder of no shipped recipe"
    tree = read_recipe(found[0]).tree
    if tree.child("task") is not None:  # a chain: its model is that of what it starts from
        start = tree.child("init")
        return recipe_of_run("runs/flickr8k-pretrain" if start is None else start.value)
    path = CATALOGUE.path(found[0])
    assert path is not None
    return path


def load(name: str) -> LoadedRecipe:
    """A shipped recipe, over the shipped recipe that it starts from; one that needs --model, over flickr8k/pretrain."""
    path = CATALOGUE.path(name)
    assert path is not None
    read = read_recipe(str(path)).tree
    needs_model = read.child("task") is not None and read.child("init") is None
    model = Path("runs/flickr8k-pretrain") if needs_model else None
    return load_run_recipe(str(path), model=model, base_of=recipe_of_run)


@every_recipe
def test_it_loads_and_its_dump_is_equal(name: str, tmp_path: Path) -> None:
    loaded = load(name)
    assert loaded.name == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(loaded.recipe), "utf-8")
    assert load_recipe(str(copy)).recipe == loaded.recipe


@every_recipe
def test_it_builds_on_the_meta_device(name: str) -> None:
    recipe = load(name).recipe
    with torch.device("meta"):
        objective = build_objective(recipe, None, Labels(("yes", "no")))
    parameters = list(objective.parameters())
    assert parameters
    assert all(parameter.is_meta for parameter in parameters)
