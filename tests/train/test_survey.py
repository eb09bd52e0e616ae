"""Indexing ahead and checking all data of a recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.files_support import SHARED, jpeg, needs_shared
from tests.train.support import tiny
from tests.train.tasks_support import tuned
from vlmoe_core.data.contact_sheet import Piece
from vlmoe_core.data.example import Sample
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.tokenizers.text import fit_wordpiece
from vlmoe_core.train.build import build_dataset
from vlmoe_core.train.fitting import obtain_labels, obtain_tokenizers
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.survey import check_data, index_data, pieces_of

DOCUMENT = "The red dog runs. It sees a cat! The cat sleeps under a tall tree.\n"


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> LoadedRecipe:
    """Texts of 40 documents; six captioned pictures, of which one is cut."""
    (tmp_path / "text.txt").write_text(DOCUMENT * 40)
    lines = [{"image": f"{i}.jpg", "caption": f"a dog and {i} cats"} for i in range(6)]
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(size=(32, 24)))
    (tmp_path / "5.jpg").write_bytes(jpeg(size=(64, 64))[:300])
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pair = "[{source: jsonl, path: captions.jsonl}]"
    text = "[{source: text, path: text.txt}]"
    return tiny(
        tmp_path,
        f"data.root={tmp_path}",
        f"data.train={{image: {pair}, text: {text}, pair: {pair}}}",
        f"data.eval={{pair: {pair}}}",
        f"data.test={{text: {text}}}",
        "data.on_error=skip",
    )


def test_a_run_finds_every_index_that_was_built_ahead(files: LoadedRecipe, cache: Path, tmp_path: Path) -> None:
    notes = Notes()
    indexed = index_data(files.recipe, notes)
    assert indexed.cache == cache and len(notes.notes) == 1 and "fitted" in notes.notes[0]
    assert [(row.split, row.stream) for row in indexed.sources] == [
        ("train", "image"),
        ("train", "text"),
        ("train", "pair"),
        ("eval", "pair"),
        ("test", "text"),
    ]
    assert [row.examples for row in indexed.sources if row.stream != "text"] == [6, 6, 6]
    known = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")}
    assert {path.parent.name for path in known} == {"jsonl-1", "text-1"}
    tokenizers = obtain_tokenizers(files.recipe, tmp_path / "tokenizers", Reporter())
    for name in ("train", "eval", "test"):
        build_dataset(files.recipe, getattr(files.recipe.data, name), tokenizers, training=name == "train")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")} == known


def test_every_source_is_surveyed(files: LoadedRecipe, tmp_path: Path) -> None:
    checked = check_data(files, None, tmp_path / "out" / "deep", Reporter())
    by_place = {(row.split, row.stream): survey for row, survey in checked.sources}
    assert len(by_place) == 5
    assert [len(survey.broken) for survey in by_place.values()] == [1, 0, 1, 1, 0]
    assert len(checked.broken) == 3 and all(message.startswith("captions.jsonl:6") for message in checked.broken)
    captions, packs = by_place["train", "pair"].text, by_place["train", "text"].text
    assert captions is not None and captions.limit == files.recipe.data.max_text.pair
    assert packs is not None and packs.maximum <= files.recipe.data.max_text.text and packs.cut == 0
    assert checked.sheet == tmp_path / "out" / "deep" / "tiny-contact-sheet.png"
    with Image.open(checked.sheet) as sheet:
        assert sheet.format == "PNG" and sheet.width == 1440 and sheet.height > 900


def test_a_limit_is_said(files: LoadedRecipe, tmp_path: Path) -> None:
    notes = Notes()
    checked = check_data(files, 2, tmp_path, notes)
    assert all(survey.read == 2 for _, survey in checked.sources)
    assert "reading 2 of 6 examples: data.eval.pair, jsonl captions.jsonl" in notes.notes


def test_the_same_data_give_the_same_sheet(files: LoadedRecipe, tmp_path: Path) -> None:
    first, second = (check_data(files, 1, tmp_path / name, Reporter()).sheet for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_the_labels_of_a_task_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sources there are: to find them is to read every record."""
    calls: list[object] = []
    monkeypatch.setattr(
        "vlmoe_core.train.survey.obtain_labels", lambda recipe: calls.append(recipe) or obtain_labels(recipe)
    )
    checked = check_data(tuned(tmp_path, "vqa"), 2, tmp_path, Reporter())
    assert len(checked.sources) == 3 and not checked.broken and len(calls) == 1


def test_a_recipe_without_texts(tmp_path: Path) -> None:
    loaded = tiny(
        tmp_path,
        "data={max_text: {text: 24, pair: 16}, train: {image: [{source: scenes, size: 5}]}}",
        "batch={size: {image: 2}, micro: {image: 2}}",
    )
    assert [row.examples for row in index_data(loaded.recipe, Reporter()).sources] == [5]
    (_, survey), *others = check_data(loaded, None, tmp_path, Reporter()).sources
    assert not others and survey.text is None and survey.image is not None


def test_missing_sources_and_folders_that_can_not_be(files: LoadedRecipe, tmp_path: Path) -> None:
    absent = tiny(tmp_path, "data.test={pair: [{source: jsonl, path: absent.jsonl}]}")
    for work in (lambda: index_data(absent.recipe, Reporter()), lambda: check_data(absent, 1, tmp_path, Reporter())):
        with pytest.raises(DataError, match=r"nothing matches 'absent.jsonl'"):
            work()
    with pytest.raises(UsageError, match="can't be made"):
        check_data(files, 1, tmp_path / "text.txt", Reporter())


def test_pieces_show_the_original_words() -> None:
    tokenizer = fit_wordpiece(["a dog runs, a cat runs"] * 3 + ["dogs"], 40, True)
    ids = [tokenizer.cls_id, *tokenizer.encode("A dogs, 狗 runs"), tokenizer.sep_id, tokenizer.pad_id]
    targets = [-1] * len(ids)
    hidden = tokenizer.encode("a dogs")[1]
    place = ids.index(hidden)
    targets[place], ids[place] = hidden, tokenizer.mask_id
    pieces = list(pieces_of(Sample("", 0, text_ids=np.array(ids), text_targets=np.array(targets)), tokenizer))
    assert pieces[0] == Piece("a", hidden=False, glued=False)
    assert "".join((" " * (not piece.glued)) + piece.text for piece in pieces).strip() == "a dogs, [UNK] runs"
    assert [piece.hidden for piece in pieces].count(True) == 1
    assert pieces[1] == Piece(tokenizer.id_to_token(hidden), hidden=True, glued=False)


@needs_shared
def test_broken_pictures_are_named(tmp_path: Path) -> None:
    loaded = tiny(
        tmp_path,
        f"data.root={SHARED}/broken",
        "data.train={pair: [{source: jsonl, path: [good.jsonl, broken-image.jsonl, missing-image.jsonl]}]}",
        "data.eval={}",
        "batch={size: {pair: 2}, micro: {pair: 2}}",
    )
    ((_, survey),) = check_data(loaded, None, tmp_path, Reporter()).sources
    assert survey.examples == 15
    assert [message.split(": ")[0] for message in survey.broken] == ["broken-image.jsonl:3", "missing-image.jsonl:3"]
