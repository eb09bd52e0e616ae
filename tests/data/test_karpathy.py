import json
import pickle

import pytest
from pydantic import ValidationError

from tests.data.files_support import SHARED, jpeg, needs_shared, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError


def entry(name, split="train", captions=("x",), **more):
    return {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": text} for text in captions], **more}


ENTRIES = [
    entry("red", "test", ["a red card", "red"], filepath="b"),
    entry("green", "train", ["a green card"], filepath="a"),
    entry("blue", "restval", ["a blue card", "blüe"], filepath="a"),
]


@pytest.fixture
def folder(tmp_path):
    for place, color in (("b", "red"), ("a", "green"), ("a", "blue"), ("", "red")):
        (tmp_path / "photos" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / place / f"{color}.jpg").write_bytes(jpeg(color))
    return tmp_path


def write(folder, *entries, name="a.json"):
    (folder / name).write_text(json.dumps({"images": list(entries), "dataset": "coco"}))


def opened(folder, stream="pair", split="train", path="a.json"):
    return open_source(folder, stream, source="karpathy", path=path, images="photos", split=split)


def all_of(source):
    return [(e.text, e.image_id, e.image) for e in map(source.__getitem__, range(len(source)))]


def test_splits(folder):
    write(folder, *ENTRIES)
    red, green, blue = (jpeg(color) for color in ("red", "green", "blue"))
    assert all_of(opened(folder, split="test")) == [("a red card", 0, red), ("red", 0, red)]
    both = opened(folder, split=["train", "restval"])
    assert all_of(both) == [("a green card", 1, green), ("a blue card", 2, blue), ("blüe", 2, blue)]
    assert [e.name for e in both.records()] == ["a.json:images[1]", "a.json:images[2]", "a.json:images[2]"]
    assert list(both.texts()) == ["a green card", "a blue card", "blüe"]
    assert all_of(opened(folder, "image", ["restval", "train"])) == [(None, 1, green), (None, 2, blue)]
    assert all_of(opened(folder, "text", "test")) == [("a red card", -1, None), ("red", -1, None)]
    assert isinstance(both, LabelledSource) and both.blocks == [3]
    with pytest.raises(IndexError):
        both[3]
    assert pickle.loads(pickle.dumps(both))[1] == both[1]


def test_files_of_one_folder_have_no_filepath(folder):
    write(folder, entry("red"))
    assert opened(folder)[0].image == jpeg("red")


def test_several_files_share_no_picture(folder):
    write(folder, *ENTRIES)
    write(folder, entry("red"), name="b.json")
    source = opened(folder, path=["a.json", "b.json"])
    assert [source[i].image_id for i in (0, 1)] == [1, 3] and source.blocks == [1, 1]
    assert source[1].name == "b.json:images[0]"


def test_a_split_that_is_not_there(folder):
    write(folder, *ENTRIES)
    with pytest.raises(DataError, match=r"^a.json: has no pictures of split 'val'; it has train, restval, test"):
        opened(folder, split=["train", "val"])
    with pytest.raises(ValidationError, match="'train', 'restval', 'val' or 'test'"):
        opened(folder, split="dev")
    with pytest.raises(ValidationError, match="names no split"):
        opened(folder, split=[])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (entry("none"), "there is no file .*photos/none.jpg"),
        (entry("../red"), r"'../red.jpg' leads out of"),
        (entry("red", filepath=3), "'filename' must name a picture"),
        ({"split": "train", "sentences": [{"raw": "x"}]}, "'filename' must name a picture"),
        (entry("red", captions=[" "]), "'raw' is empty"),
        (entry("red", captions=[3]), "'raw' must hold strings, not a number"),
        (entry("red", captions=[]), "'raw' must hold strings, not a null"),
    ],
)
def test_a_broken_picture_is_one_example_that_raises(folder, broken, reason):
    write(folder, entry("red"), broken, entry("red"))
    source = opened(folder)
    assert len(source) == 3 and source[2].image == jpeg("red")
    with pytest.raises(DataError, match=rf"^a.json:images\[1\]: {reason}"):
        source[1]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (entry("red", "dev"), r"a.json:images\[1\]: 'split' must be one of train, restval, val, test, not 'dev'"),
        ({"filename": "red.jpg"}, r"a.json:images\[1\]: 'split' must be .*, not None"),
        (
            {"split": "train", "captions": []},
            r"a.json:images\[1\]: has no list 'sentences'; its fields: split, captions",
        ),
        (4, "a.json: item 2 of 'images' is no JSON object"),
    ],
)
def test_a_file_that_is_not_made_so(folder, broken, reason):
    write(folder, entry("red"), broken)
    with pytest.raises(DataError, match=f"^{reason}"):
        opened(folder)


@needs_shared
def test_real_file():
    folder = SHARED / "coco"
    fields = {"source": "karpathy", "path": "dataset_coco.json", "images": "."}
    document = json.loads((folder / "dataset_coco.json").read_text())
    for split, pictures in (("train", 40), ("val", 10), ("test", 10)):
        entries = [image for image in document["images"] if image["split"] == split]
        pair = open_source(folder, "pair", split=split, **fields)
        assert (len(pair), len(open_source(folder, "image", split=split, **fields))) == (5 * pictures, pictures)
        assert list(pair.texts()) == [sentence["raw"] for image in entries for sentence in image["sentences"]]
        last = entries[-1]
        assert pair[len(pair) - 1].image == (folder / last["filepath"] / last["filename"]).read_bytes()
        assert len({example.image_id for example in pair.records()}) == pictures
