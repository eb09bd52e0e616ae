"""Dotted overrides on a tree."""

from typing import Any

import pytest

from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.overrides import apply_overrides
from vlmoe_core.recipe.tree import Node, nearest_node, plain
from vlmoe_core.recipe.yaml12 import parse

TEXT = """\
train: {steps: 10, trackers: [wandb]}
model:
  moe: null
data:
  pair: [{path: a}, {path: b}]
  text: []
"""


def tree() -> Node:
    root = parse(TEXT, "f.yaml")
    assert root is not None
    return root


def overridden(*overrides: str) -> Any:
    return plain(apply_overrides(tree(), overrides))


def test_values_are_yaml() -> None:
    assert overridden("train.lr=1e-4")["train"]["lr"] == 1e-4
    assert overridden("out=no")["out"] == "no"
    assert overridden("out=")["out"] is None
    assert overridden("out=a=b")["out"] == "a=b"
    assert overridden("train.trackers=[trackio, tensorboard]")["train"]["trackers"] == ["trackio", "tensorboard"]


def test_a_mapping_replaces_and_a_key_changes_one_value() -> None:
    assert overridden("train={steps: 3}")["train"] == {"steps": 3}
    assert overridden("train.steps=3")["train"] == {"steps": 3, "trackers": ["wandb"]}


def test_list_entries_by_index() -> None:
    assert overridden("data.pair.1.path=c")["data"]["pair"] == [{"path": "a"}, {"path": "c"}]


def test_missing_and_null_mappings_are_made() -> None:
    changed = overridden("model.moe.vision.top_k=2", "optim.lr=1")
    assert changed["model"] == {"moe": {"vision": {"top_k": 2}}}
    assert changed["optim"] == {"lr": 1}


def test_the_last_one_wins_and_the_tree_stays() -> None:
    root = tree()
    assert plain(apply_overrides(root, ["train.steps=1", "train.steps=2"]))["train"]["steps"] == 2
    assert plain(root)["train"]["steps"] == 10


def test_places() -> None:
    root = apply_overrides(tree(), ["model.moe.vision.top_k=2", "train.steps=3"])
    assert nearest_node(root, ["train", "steps"]).place == "--set train.steps=3"
    assert nearest_node(root, ["train", "trackers"]).place == "f.yaml:1"
    assert nearest_node(root, ["train"]).place == "f.yaml:1"
    assert nearest_node(root, ["model", "moe", "vision", "experts"]).place == "--set model.moe.vision.top_k=2"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe", "--set moe: give it as key=value, such as --set train.steps=100"),
        ("=3", "--set =3: the key is empty or has an empty part"),
        ("a..b=3", "--set a..b=3: the key is empty or has an empty part"),
        ("train.steps.x=1", "--set train.steps.x=1: train.steps is 10 (f.yaml:1), it has no 'x'"),
        (
            "data.pair.2.path=c",
            "--set data.pair.2.path=c: data.pair is a list, '2' is none of its entries; give an index from 0 to 1",
        ),
        ("data.pair.-1.path=c", "'-1' is none of its entries"),
        ("data.pair.x=c", "'x' is none of its entries; give an index from 0 to 1"),
        ("data.text.0=c", "data.text is a list, '0' is none of its entries; it is empty"),
        ("a=[1", "--set a=[1: not valid YAML: "),
        ("a={b: 1, b: 2}", "--set a={b: 1, b: 2}: duplicate key 'b'"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        overridden(override)
    assert message in str(caught.value)
