"""Names of shipped recipes."""

from pathlib import Path

import pytest

from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.catalogue import Catalogue, head_comment, shipped, summary


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    root = tmp_path / "shipped"
    for name in ("quickstart/pretrain", "flickr8k/pretrain", "flickr8k/dense"):
        file = root / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# About {name}\n# vlmoe pretrain {name}\n\n# no head\na: 1\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return Catalogue(root)


def test_names_and_summaries(catalogue: Catalogue) -> None:
    assert catalogue.names() == ["flickr8k/dense", "flickr8k/pretrain", "quickstart/pretrain"]
    assert catalogue.summaries()["flickr8k/dense"] == "About flickr8k/dense"


def test_a_name_is_found_and_named_back(catalogue: Catalogue) -> None:
    path = catalogue.find("quickstart/pretrain")
    assert path == catalogue.root / "quickstart/pretrain.yaml"
    assert catalogue.name_of(path) == "quickstart/pretrain"
    assert catalogue.name_of(Path("other.yaml")) is None


def test_an_existing_path_wins(catalogue: Catalogue) -> None:
    own = Path("quickstart/pretrain")
    own.parent.mkdir()
    own.write_text("a: 2")
    assert catalogue.find("quickstart/pretrain") == own


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "recipes/quickstart/pretrain.yaml",
            "'recipes/quickstart/pretrain.yaml' is no file here; the shipped recipe of that name is ",
        ),
        ("quickstart/pretrain.yaml", "the shipped recipe of that name is 'quickstart/pretrain'"),
        (
            "quickstart/pretrian",
            "no file here and no shipped recipe has that name; did you mean 'quickstart/pretrain'?",
        ),
        ("zzz", "known: flickr8k/dense, flickr8k/pretrain, quickstart/pretrain"),
        ("my.yaml", "'my.yaml' is no file; paths start from the working folder"),
        (".", "'.' is a folder, not a recipe"),
        ("../shipped/quickstart", "is a folder, not a recipe"),
        ("../shipped/quickstart/pretrain", "no recipe '../shipped/quickstart/pretrain'"),
    ],
)
def test_what_is_not_found(catalogue: Catalogue, typed: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        catalogue.find(typed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_head_comment() -> None:
    assert head_comment("# a\n#b\n\n# c\nd: 1\n") == "# a\n#b\n"
    assert head_comment("d: 1\n# a\n") == ""
    assert head_comment("# only") == "# only\n"
    assert summary("#   a title \n# more") == "a title"
    assert summary("a: 1") == ""


def test_every_shipped_recipe_opens_with_a_comment() -> None:
    catalogue = shipped()
    assert "quickstart/pretrain" in catalogue.names()
    for name in catalogue.names():
        text = (catalogue.root / f"{name}.yaml").read_text("utf-8")
        assert summary(text), f"{name} has no head comment"
        assert "vlmoe " in head_comment(text), f"the head comment of {name} names no command"
