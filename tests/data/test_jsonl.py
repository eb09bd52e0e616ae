import json
import pickle

import pytest

from tests.data.files_support import files_below, jpeg, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for color in ("red", "green"):
        (tmp_path / "photos" / f"{color}.jpg").write_bytes(jpeg(color))
    return tmp_path


def write(folder, *records, name="a.jsonl"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


RED = {"image": "photos/red.jpg", "caption": ["a red card", "red"]}
GREEN = {"image": "photos/green.jpg", "caption": "a green card"}


def test_captions_are_examples_of_one_picture(folder):
    write(folder, RED, GREEN)
    pair = open_source(folder, "pair", source="jsonl", path="a.jsonl")
    assert [(e.name, e.text, e.image_id) for e in map(pair.__getitem__, range(3))] == [
        ("a.jsonl:1", "a red card", 0),
        ("a.jsonl:1", "red", 0),
        ("a.jsonl:2", "a green card", 1),
    ]
    assert pair[1].image == jpeg("red") and len(pair) == 3
    image = open_source(folder, "image", source="jsonl", path="a.jsonl")
    assert [(e.image, e.text, e.image_id) for e in (image[0], image[1])] == [
        (jpeg("red"), None, 0),
        (jpeg("green"), None, 1),
    ]
    text = open_source(folder, "text", source="jsonl", path="a.jsonl")
    assert [(e.text, e.image, e.image_id) for e in map(text.__getitem__, range(3))] == [
        ("a red card", None, -1),
        ("red", None, -1),
        ("a green card", None, -1),
    ]
    with pytest.raises(IndexError):
        pair[3]


def test_lines_that_name_the_same_picture_share_it(folder):
    write(folder, {**RED, "caption": "one"}, GREEN, {**RED, "caption": "two"})
    write(folder, GREEN, name="b.jsonl")
    pair = open_source(folder, "pair", source="jsonl", path=["a.jsonl", "b.jsonl"])
    assert [pair[i].image_id for i in range(4)] == [0, 1, 0, 3]
    image = open_source(folder, "image", source="jsonl", path="*.jsonl")
    assert [image[i].image_id for i in range(len(image))] == [0, 1, 3]
    assert (pair.blocks, image.blocks) == ([3, 1], [2, 1])


def test_fields_and_image_root_are_named(folder):
    (folder / "lists").mkdir()
    write(folder, {"file": "red.jpg", "sentences": ["x"]}, name="lists/a.jsonl")
    source = open_source(
        folder,
        "pair",
        source="jsonl",
        path="lists/*.jsonl",
        image_field="file",
        text_field="sentences",
        image_root="photos",
    )
    assert (source[0].name, source[0].text, source[0].image) == ("lists/a.jsonl:1", "x", jpeg("red"))


def test_texts_leave_out_what_is_broken(folder):
    write(folder, RED, "{", {"caption": ["", 3, "\ud800", "kept"]}, {"image": "x"}, GREEN)
    source = open_source(folder, "image", source="jsonl", path="a.jsonl")
    assert list(source.texts()) == ["a red card", "red", "kept", "a green card"]


def test_records_leave_out_pictures_and_what_is_broken(folder):
    write(folder, RED, "{", {"image": "photos/red.jpg", "caption": ["", "kept"]}, GREEN)
    source = open_source(folder, "pair", source="jsonl", path="a.jsonl")
    assert isinstance(source, LabelledSource)
    assert [(e.name, e.text, e.image_id, e.image) for e in source.records()] == [
        ("a.jsonl:1", "a red card", 0, None),
        ("a.jsonl:1", "red", 0, None),
        ("a.jsonl:3", "kept", 0, None),
        ("a.jsonl:4", "a green card", 3, None),
    ]
    image = open_source(folder, "image", source="jsonl", path="a.jsonl")
    assert [(e.image_id, e.text) for e in image.records()] == [(0, None), (3, None)]
    text = open_source(folder, "text", source="jsonl", path="a.jsonl")
    assert [(e.image_id, e.text) for e in text.records()][2:] == [(-1, "kept"), (-1, "a green card")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "is no JSON"),
        ("[1]", r"no JSON object .* a list"),
        ('{"image": "photos/red.jpg", "caption": "x", "score": Infinity}', "Infinity is not JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"image": "photos/red.jpg", "caption": "\udcff"}', "not valid UTF-8"),
        ('{"image": "photos/red.jpg", "caption": "\\ud800"}', "half a surrogate pair"),
        ({"image": "photos/red.jpg"}, r"no field 'caption' .* its fields: image"),
        ({"image": "photos/red.jpg", "caption": 4}, "not a number"),
        ({"image": "photos/red.jpg", "caption": None}, "not a null"),
        ({"image": "photos/red.jpg", "caption": []}, "empty list"),
        ({"image": "photos/red.jpg", "caption": [3]}, "strings, not a number"),
        ({"image": "photos/red.jpg", "caption": " \n"}, "is empty"),
        ({"caption": "x"}, "must name a picture, not None"),
        ({"image": 3, "caption": "x"}, "must name a picture, not 3"),
        ({"image": "no.jpg", "caption": "x"}, "there is no file .*no.jpg"),
        ({"image": "photos", "caption": "x"}, "there is no file .*photos"),
        ({"image": "../x.jpg", "caption": "x"}, "leads out of"),
        ({"image": "photos/../../x.jpg", "caption": "x"}, "leads out of"),
        ({"image": "/etc/passwd", "caption": "x"}, "leads out of"),
    ],
)
def test_a_broken_line_is_one_example_that_raises(folder, record, reason):
    write(folder, GREEN, record, GREEN)
    source = open_source(folder, "pair", source="jsonl", path="a.jsonl")
    assert len(source) == 3
    assert source[0].text == source[2].text == "a green card"
    with pytest.raises(DataError, match=f"^a.jsonl:2: .*{reason}"):
        source[1]


def test_a_picture_outside_is_neither_read_nor_written(folder):
    inner = folder / "inner"
    inner.mkdir()
    write(inner, {"image": "../photos/red.jpg", "caption": "x"})
    before = files_below(folder)
    source = open_source(inner, "pair", source="jsonl", path="a.jsonl")
    with pytest.raises(DataError, match="leads out of"):
        source[0]
    assert files_below(folder) == before


def test_marks_blank_lines_and_carriage_returns(folder):
    green = json.dumps(GREEN).encode()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + green + b"\r\n\r\n  \n" + green)
    source = open_source(folder, "pair", source="jsonl", path="a.jsonl")
    assert [source[i].name for i in range(len(source))] == ["a.jsonl:1", "a.jsonl:4"]


def test_a_source_travels_to_worker_processes(folder):
    write(folder, RED)
    source = open_source(folder, "pair", source="jsonl", path="a.jsonl")
    assert source[0] == pickle.loads(pickle.dumps(source))[0]


@pytest.mark.parametrize("path", ["no.jsonl", "no/*.jsonl"])
def test_a_path_that_matches_nothing(folder, path):
    with pytest.raises(DataError, match=rf"nothing matches '.*' \(looked for {folder}/no.*--set data.root"):
        open_source(folder, "pair", source="jsonl", path=path)


def test_a_folder_is_no_file(folder):
    with pytest.raises(DataError, match="'photos' is a folder"):
        open_source(folder, "pair", source="jsonl", path="photos")


def test_names_with_brackets_and_absolute_paths(tmp_path):
    root = tmp_path / "[x]"
    root.mkdir()
    write(root, GREEN, name="a[1].jsonl")
    for path in ("a[1].jsonl", "*.jsonl", str(root / "a[1].jsonl")):
        assert len(open_source(root, "text", source="jsonl", path=path)) == 1


def test_a_file_that_was_cut_since(folder):
    write(folder, GREEN, GREEN)
    source = open_source(folder, "text", source="jsonl", path="a.jsonl")
    (folder / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"a.jsonl:2: .* was it cut"):
        source[1]
