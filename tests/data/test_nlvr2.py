import io
import json
import pickle

import pytest
from PIL import Image

from tests.data.files_support import SHARED, jpeg, needs_shared, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError


def write(folder, *records, name="dev.json"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")


def statement(identifier="dev-1-0-0", label="True", **more):
    return {"identifier": identifier, "sentence": f"about {identifier}", "label": label, **more}


def opened(folder, **fields):
    return open_source(folder, "pair", **{"source": "nlvr2", "path": "dev.json"} | fields)


def put(folder, name, data):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


@pytest.fixture
def folder(tmp_path):
    for stem, width in (("dev/dev-1-0", 4), ("dev/dev-1-1", 6), ("images/train/47/train-9-2", 8)):
        for side in (0, 1):
            put(tmp_path, f"{stem}-img{side}.png", jpeg(size=(width, width + side)))
    return tmp_path


def test_two_pictures_of_each_statement(folder):
    write(folder, statement(), statement("dev-1-1-0", "False"), statement("dev-1-0-1", "False"))
    source = opened(folder)
    examples = [source[i] for i in range(len(source))]
    assert [e.name for e in examples] == ["dev.json:1", "dev.json:2", "dev.json:3"]
    assert [(e.image, e.more_images) for e in examples] == [
        (jpeg(size=(w, w)), (jpeg(size=(w, w + 1)),)) for w in (4, 6, 4)
    ]
    assert [e.image_id for e in examples] == [0, 1, 0]
    assert [e.text for e in examples] == ["about dev-1-0-0", "about dev-1-1-0", "about dev-1-0-1"]
    assert [e.facts for e in examples] == [
        {"id": "dev-1-0-0", "label": "True"},
        {"id": "dev-1-1-0", "label": "False"},
        {"id": "dev-1-0-1", "label": "False"},
    ]
    assert source.blocks == [3]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            source[outside]


def test_train_lies_in_folders_and_elsewhere(folder):
    """The annotations come from one place, the pictures from another; several files are numbered on."""
    write(folder, statement("train-9-2-3", directory=47), name="lists/train.json")
    write(folder, statement(), name="lists/dev.json")
    source = opened(folder, path="lists/*.json", images=".")
    assert [(source[i].name, source[i].image_id) for i in (0, 1)] == [
        ("lists/dev.json:1", 0),
        ("lists/train.json:1", 1),
    ]
    assert source[1].image == jpeg(size=(8, 8))


def test_a_test_set_has_no_labels(folder):
    write(folder, {"identifier": "dev-1-0-0", "sentence": "x"})
    assert opened(folder)[0].facts == {"id": "dev-1-0-0"}


def test_records_leave_out_pictures_and_what_is_broken(folder):
    write(folder, statement(), "{", statement(label="maybe"), statement("dev-7-7-0"))
    source = opened(folder)
    assert isinstance(source, LabelledSource)
    assert [(e.facts["id"], e.image, e.more_images, e.image_id) for e in source.records()] == [
        ("dev-1-0-0", None, (), 0),
        ("dev-7-7-0", None, (), 3),
    ]
    assert list(source.texts()) == ["about dev-1-0-0", "about dev-7-7-0"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "is no JSON"),
        (statement(label="maybe"), "the label must be 'True' or 'False', as a string, not 'maybe'"),
        (statement(label=True), "the label must be .* not True"),
        (statement(label=[]), r"the label must be .* not \[\]"),
        (statement("dev-7-7-0"), "there is no file .*dev/dev-7-7-img0.png"),
        (statement("train-9-2-3", directory=1), "there is no file .*images/train/1/train-9-2-img0.png"),
        (statement("dev-1-0-x"), "the identifier 'dev-1-0-x' is not like dev-850-0-1"),
        (statement("12"), "the identifier '12' is not like .*layout: nlvr"),
        (statement("../x-1-0"), "leads out of"),
        (statement(sentence=" "), "'sentence' is empty"),
        ({"identifier": "dev-1-0-0"}, "has no field 'sentence'; its fields: identifier"),
        ({"sentence": "x"}, "has no field 'identifier'; its fields: sentence"),
    ],
)
def test_a_broken_line_is_one_example_that_raises(folder, record, reason):
    write(folder, statement(), record, statement())
    source = opened(folder)
    assert len(source) == 3 and source[2].text == "about dev-1-0-0"
    with pytest.raises(DataError, match=f"^dev.json:2: .*{reason}"):
        source[1]


def test_the_second_picture_is_missing(folder):
    (folder / "dev/dev-1-0-img1.png").unlink()
    write(folder, statement())
    with pytest.raises(DataError, match=r"^dev.json:1: there is no file .*dev-1-0-img1.png"):
        opened(folder)[0]


def drawing(size=(400, 100)):
    """Three boxes of one colour each, and something else between them."""
    picture = Image.new("RGBA", size, "black")
    for left, colour in ((0, "red"), (150, "green"), (300, "blue")):
        picture.paste(Image.new("RGBA", (100, 100), colour), (left, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_three_boxes_of_a_drawing(tmp_path):
    put(tmp_path, "images/3/dev-12-0-0.png", drawing())
    named = statement("12-0", "true", image="images/3/dev-12-0-0.png")
    write(tmp_path, statement("12-0", "false", directory="3"), named, statement("12-1", directory="3"))
    source = opened(tmp_path, layout="nlvr")
    first = source[0]
    for picture, colour in zip((first.image, *first.more_images), ("red", "green", "blue"), strict=True):
        assert picture == Image.new("RGBA", (100, 100), colour)
    assert first.facts == {"id": "12-0", "label": "False"}
    assert source[1].facts["label"] == "True" and source[1].image_id == first.image_id == 0
    with pytest.raises(DataError, match=r"^dev.json:3: there is no file .*images/3/dev-12-1-0.png"):
        source[2]
    assert [e.image_id for e in source.records()] == [0, 0, 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (drawing((300, 100)), "has 300 x 100 pixels; .* has 400 x 100"),
        (drawing()[:-60], "can't be decoded"),
        (jpeg(size=(400, 100)), "can't be decoded"),
        (b"", "can't be decoded"),
    ],
)
def test_what_is_no_drawing_of_three_boxes(tmp_path, data, reason):
    put(tmp_path, "images/3/dev-12-0-0.png", data)
    write(tmp_path, statement("12-0", directory="3"))
    with pytest.raises(DataError, match=f"^dev.json:1: images/3/dev-12-0-0.png: {reason}"):
        opened(tmp_path, layout="nlvr")[0]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (statement("12-0"), "has no field 'directory'"),
        (statement("12-0", image="../x.png"), "leads out of"),
        (statement("12-0", image=None), "there is no file .*None"),
    ],
)
def test_a_drawing_that_is_not_named(tmp_path, record, reason):
    write(tmp_path, record)
    with pytest.raises(DataError, match=f"^dev.json:1: .*{reason}"):
        opened(tmp_path, layout="nlvr")[0]


def test_only_pairs(folder):
    write(folder, statement())
    with pytest.raises(DataError, match="no examples for the text stream; name it under 'pair'"):
        open_source(folder, "text", source="nlvr2", path="dev.json")


def test_a_source_travels_to_worker_processes(folder):
    write(folder, statement())
    source = opened(folder)
    assert source[0] == pickle.loads(pickle.dumps(source))[0]


@needs_shared
@pytest.mark.parametrize("split", ["dev", "test1"])
def test_nlvr2_with_photographs(split):
    source = opened(SHARED / "nlvr2", path=f"data/{split}-with-images.json", images=".")
    examples = [source[i] for i in range(len(source))]
    assert len(examples) == 8
    assert all(picture.startswith(b"\xff\xd8") for e in examples for picture in (e.image, *e.more_images))
    pairs = {e.facts["id"].rpartition("-")[0] for e in examples}
    assert len({(e.image, e.more_images) for e in examples}) == len({e.image_id for e in examples}) == len(pairs) == 4


@needs_shared
def test_all_statements_of_nlvr2_dev():
    records = list(opened(SHARED / "nlvr2", path="data/dev.json", images=".").records())
    assert len(records) == 6982
    pairs = {e.facts["id"].rpartition("-")[0]: e.image_id for e in records}
    assert len(set(pairs.values())) == len(pairs) == 4051
    assert all(pairs[e.facts["id"].rpartition("-")[0]] == e.image_id for e in records)


@needs_shared
@pytest.mark.parametrize(("split", "true", "false"), [("dev", 547, 442), ("train", 587, 413)])
def test_nlvr(split, true, false):
    source = opened(SHARED / "nlvr1", path=f"{split}/{split}.json", layout="nlvr")
    labels = [e.facts["label"] for e in source.records()]
    assert (labels.count("True"), labels.count("False")) == (true, false)
    assert len({e.image_id for e in source.records()}) == true + false
    example = source[17]
    assert [picture.size for picture in (example.image, *example.more_images)] == [(100, 100)] * 3
