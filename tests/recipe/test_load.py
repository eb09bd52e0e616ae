"""Reading, extending, overriding and validating whole recipes."""

from pathlib import Path

import pytest

from vlmoe_core.errors import RecipeError, UsageError
from vlmoe_core.recipe.catalogue import Catalogue, shipped
from vlmoe_core.recipe.load import copy_recipe, dump_recipe, load_recipe, read_recipe
from vlmoe_core.recipe.tree import plain

BASE = """\
# A small run
# vlmoe pretrain toy/base

model:
  preset: tiny
  moe:
    vision: {num_experts: 4}
data:
  train:
    image: [{source: scenes}]  # drawn pictures
    text: [{source: scenes}]
objective: {name: masked}
batch:
  size: {image: 8, text: 8}
  micro: {image: 4, text: 4}
train: {steps: 10}
"""

VARIANT = """\
# More experts
extends: toy/base
model:
  moe:
    vision: {num_experts: 8}
data:
  train:
    image: [{source: scenes, weight: 2}]
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    root = tmp_path / "shipped"
    (root / "toy").mkdir(parents=True)
    (root / "toy/base.yaml").write_text(BASE)
    (root / "toy/variant.yaml").write_text(VARIANT)
    return Catalogue(root)


def write(folder: Path, text: str | bytes, name: str = "my.yaml") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def message(name: str, *overrides: str, catalogue: Catalogue | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides, catalogue)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_by_name(catalogue: Catalogue) -> None:
    loaded = load_recipe("toy/base", catalogue=catalogue)
    assert loaded.recipe.model.dim == 128 and loaded.recipe.train.steps == 10
    assert (loaded.name, loaded.path) == ("toy/base", catalogue.root / "toy/base.yaml")
    assert loaded.text == BASE


def test_by_path(catalogue: Catalogue, tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, BASE), catalogue=catalogue).name == "my"
    assert load_recipe(str(catalogue.root / "toy/base.yaml"), catalogue=catalogue).name == "toy/base"


def test_windows_lines_and_a_byte_order_mark(catalogue: Catalogue, tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    assert load_recipe(path, catalogue=catalogue).recipe == load_recipe("toy/base", catalogue=catalogue).recipe


def test_overrides_beat_the_file(catalogue: Catalogue) -> None:
    loaded = load_recipe("toy/base", ["train.steps=3", "data.train.image.0.weight=2"], catalogue)
    assert loaded.recipe.train.steps == 3 and loaded.recipe.data.train.image[0].weight == 2
    assert loaded.text.startswith("# A small run\n# vlmoe pretrain toy/base\n") and "steps: 3" in loaded.text


def test_extends_merges_mappings_and_replaces_lists(catalogue: Catalogue) -> None:
    loaded = load_recipe("toy/variant", catalogue=catalogue)
    assert loaded.recipe.model.moe.vision is not None and loaded.recipe.model.moe.vision.num_experts == 8
    assert [source.weight for source in loaded.recipe.data.train.image] == [2.0]
    assert len(loaded.recipe.data.train.text) == 1


def test_merged_text_stands_alone(catalogue: Catalogue, tmp_path: Path) -> None:
    read = read_recipe("toy/variant", catalogue=catalogue)
    assert read.text.startswith("# More experts\n") and "extends" not in read.text
    assert list(plain(read.tree)) == ["model", "data", "objective", "batch", "train"]
    copy = load_recipe(write(tmp_path, read.text), catalogue=Catalogue(tmp_path / "nothing"))
    assert copy.recipe == load_recipe("toy/variant", catalogue=catalogue).recipe


def test_extends_a_file_beside_it(catalogue: Catalogue, tmp_path: Path) -> None:
    write(tmp_path, BASE, "base.yaml")
    loaded = load_recipe(write(tmp_path, "extends: base.yaml\ntrain: {steps: 4}"), catalogue=catalogue)
    assert loaded.text.startswith("model:\n")
    assert loaded.recipe.train.steps == 4 and loaded.recipe.model.layers == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: toy/variant", ":1: extends: 'toy/variant' itself extends 'toy/base'"),
        (
            "a: 1\nextends: toy/bse",
            ":2: extends: 'toy/bse' is no file beside it and no shipped recipe; known: toy/base, toy/variant",
        ),
        ("extends: [toy/base]", ":1: extends: must name one recipe, not ['toy/base']"),
        ("extends: my.yaml", "one level only"),
    ],
)
def test_extends_that_is_refused(catalogue: Catalogue, tmp_path: Path, text: str, expected: str) -> None:
    found = message(write(tmp_path, text), catalogue=catalogue)
    assert expected in found and found.startswith(str(tmp_path / "my.yaml")) and "\n" not in found


def test_a_mistake_in_the_base_names_the_base(catalogue: Catalogue, tmp_path: Path) -> None:
    write(tmp_path, BASE.replace("preset: tiny", "preset: tiny\n  layrs: 3"), "base.yaml")
    path = write(tmp_path, "extends: base.yaml\ntrain: {steps: many}")
    assert message(path, catalogue=catalogue).splitlines() == [
        f"{tmp_path / 'base.yaml'}:6: model.layrs: unknown key; did you mean 'layers'?",
        f"{path}:2: train.steps: must be a whole number, not 'many'",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": the file holds no recipe; "),
        (b"# only a comment\n", ": the file holds no recipe; "),
        (b"null", ": the file holds no recipe; "),
        (b"\n- a\n- b\n", ":2: a recipe is a mapping of keys such as 'model:' and 'data:', not a list"),
        (b"hello", ":1: a recipe is a mapping of keys such as 'model:' and 'data:', not one word"),
        (b"a: \xff\xfe", ": not UTF-8 text (byte 3); save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n", ": not UTF-8 text (byte 0)"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    path = write(tmp_path, content)
    found = message(path)
    assert found.startswith(path + expected) and "\n" not in found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("preset: tiny", "preset: tiny\n  layrs: 4", ":6: model.layrs: unknown key; did you mean 'layers'?"),
        ("steps: 10", "steps: ten", ":16: train.steps: must be a whole number, not 'ten'"),
        ("image: 8", "image: -8", ":14: batch.size.image: must be greater than or equal to 0, not -8"),
        ("preset: tiny", "preset: tiny\n  heads: 3", ":6: model: heads (3) must divide dim (128)"),
        (
            "size: {image: 8",
            "size: {image: 9",
            ":14: batch: size.image (9) is not divisible by micro.image (4); these fit: 1, 3, 9",
        ),
        ("num_experts: 4", "num_experts: 4, top_k: 5", ":7: model.moe.vision: top_k (5) is more than num_experts (4)"),
    ],
)
def test_mistakes_of_a_user_are_one_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = write(tmp_path, BASE.replace(old, new, 1))
    found = message(path)
    assert found.startswith(path + expected) and "\n" not in found


def test_dump_loads_back_equal(catalogue: Catalogue, tmp_path: Path) -> None:
    recipe = load_recipe("toy/variant", ["optim.eps=1e-7", "out=no", "seed=3"], catalogue).recipe
    text = dump_recipe(recipe)
    assert load_recipe(write(tmp_path, text)).recipe == recipe
    assert "capacity_factor: 1.25" in text, "defaults are written out"


def test_copy(catalogue: Catalogue, tmp_path: Path) -> None:
    target = tmp_path / "own.yaml"
    copy_recipe("toy/variant", target, catalogue=catalogue)
    assert target.read_text() == read_recipe("toy/variant", catalogue=catalogue).text
    with pytest.raises(UsageError, match="exists; replace it with --force"):
        copy_recipe("toy/base", target, catalogue=catalogue)
    copy_recipe("toy/base", target, overwrite=True, catalogue=catalogue)
    assert target.read_text() == BASE
    with pytest.raises(UsageError, match="is a folder; name the file"):
        copy_recipe("toy/base", tmp_path, catalogue=catalogue)
    with pytest.raises(UsageError, match="can't be written: No such file or directory"):
        copy_recipe("toy/base", tmp_path / "no" / "own.yaml", catalogue=catalogue)


def is_whole(name: str) -> bool:
    """Whether a shipped recipe has a model of its own, not that of a run."""
    return read_recipe(name).tree.child("task") is None or "init: scratch" in read_recipe(name).text


@pytest.mark.parametrize("name", list(filter(is_whole, shipped().names())))
def test_every_shipped_recipe_is_valid(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    assert load_recipe(write(tmp_path, loaded.text)).recipe == loaded.recipe
    assert load_recipe(write(tmp_path, dump_recipe(loaded.recipe))).recipe == loaded.recipe
