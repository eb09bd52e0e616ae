import json
import pickle

import pytest

from tests.data.files_support import SHARED, jpeg, needs_shared, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError

IMAGES = [{"id": 7, "file_name": "red.jpg"}, {"id": 3, "file_name": "green.jpg"}]
CAPTIONS = [
    {"image_id": 3, "id": 1, "caption": "a green card"},
    {"image_id": 7, "id": 2, "caption": "a réd card"},
    {"image_id": 3, "id": 3, "caption": "green"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for color in ("red", "green"):
        (tmp_path / "photos" / f"{color}.jpg").write_bytes(jpeg(color))
    return tmp_path


def write(folder, images=IMAGES, annotations=CAPTIONS, name="a.json"):
    (folder / name).write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def opened(folder, stream="pair", path="a.json"):
    return open_source(folder, stream, source="coco-captions", path=path, images="photos")


def test_streams(folder):
    write(folder)
    pair = opened(folder)
    assert isinstance(pair, LabelledSource)
    assert [(e.name, e.text, e.image_id, e.image) for e in map(pair.__getitem__, range(len(pair)))] == [
        ("a.json:annotations[0]", "a green card", 1, jpeg("green")),
        ("a.json:annotations[1]", "a réd card", 0, jpeg("red")),
        ("a.json:annotations[2]", "green", 1, jpeg("green")),
    ]
    image = opened(folder, "image")
    assert [(e.name, e.text, e.image_id, e.image) for e in (image[0], image[1])] == [
        ("a.json:images[0]", None, 0, jpeg("red")),
        ("a.json:images[1]", None, 1, jpeg("green")),
    ]
    assert len(image) == 2
    text = opened(folder, "text")
    assert [(text[i].text, text[i].image, text[i].image_id) for i in (0, 1)] == [
        ("a green card", None, -1),
        ("a réd card", None, -1),
    ]
    assert list(pair.texts()) == list(text.texts()) == ["a green card", "a réd card", "green"]
    assert [(e.text, e.image_id, e.image) for e in pair.records()] == [
        (e.text, e.image_id, None) for e in map(pair.__getitem__, range(3))
    ]
    for source in (pair, image, text):
        with pytest.raises(IndexError):
            source[len(source)]


def test_ids_of_one_file_mean_nothing_in_another(folder):
    write(folder)
    write(folder, [{"id": 3, "file_name": "red.jpg"}], [{"image_id": 3, "caption": "red"}], "b.json")
    pair = opened(folder, path=["a.json", "b.json"])
    assert [pair[i].image_id for i in range(4)] == [1, 0, 1, 2]
    assert pair[3].image == jpeg("red") and pair[3].name == "b.json:annotations[0]"
    assert pair.blocks == [3, 1] and opened(folder, "image", "*.json").blocks == [2, 1]


def test_pictures_without_captions_are_pictures_still(folder):
    (folder / "a.json").write_text(json.dumps({"images": IMAGES}))
    assert len(opened(folder, "image")) == 2
    with pytest.raises(DataError, match=r"^a.json: has no list 'annotations'; its fields: images"):
        opened(folder)


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"image_id": 99, "caption": "x"}, "image_id 99 is not among the images"),
        ({"image_id": 3}, "'caption' must hold strings, not a null"),
        ({"image_id": 3, "caption": " "}, "'caption' is empty"),
        ({"image_id": 8, "caption": "x"}, "'../red.jpg' leads out of"),
        ({"image_id": 9, "caption": "x"}, "there is no file .*photos/none.jpg"),
    ],
)
def test_a_broken_caption_is_one_example_that_raises(folder, annotation, reason):
    images = [*IMAGES, {"id": 8, "file_name": "../red.jpg"}, {"id": 9, "file_name": "none.jpg"}]
    write(folder, images, [CAPTIONS[0], annotation, CAPTIONS[2]])
    source = opened(folder)
    assert (source[0].text, source[2].text) == ("a green card", "green")
    with pytest.raises(DataError, match=rf"^a.json:annotations\[1\]: .*{reason}"):
        source[1]


def test_texts_leave_out_what_is_broken(folder):
    write(folder, annotations=[{"image_id": 3, "caption": text} for text in ("a", "", 3, "\ud800", "b")])
    source = opened(folder)
    assert list(source.texts()) == [e.text for e in source.records()] == ["a", "b"]


def test_a_picture_without_a_name(folder):
    write(folder, [{"id": 3}], CAPTIONS[:1])
    for stream in ("pair", "image"):
        with pytest.raises(DataError, match=r"^a.json:images\[0\]: 'file_name' must name a picture, not None"):
            opened(folder, stream)[0]


@pytest.mark.parametrize(
    ("images", "annotations", "reason"),
    [
        ([*IMAGES, IMAGES[0]], CAPTIONS, r"^a.json: the id 7 stands in 'images' more than once"),
        ([{"id": "7"}], CAPTIONS, r"^a.json:images\[0\]: 'id' must be a whole number, not '7'"),
        (
            IMAGES,
            [CAPTIONS[0], {"caption": "x"}],
            r"^a.json:annotations\[1\]: 'image_id' must be a whole number, not N",
        ),
        (IMAGES, ["x"], "^a.json: item 1 of 'annotations' is no JSON object"),
    ],
)
def test_a_file_that_is_not_made_so(folder, images, annotations, reason):
    write(folder, images, annotations)
    with pytest.raises(DataError, match=reason):
        opened(folder)


@pytest.mark.parametrize("text", ['{"images": [', "[]", ""])
def test_a_file_that_is_no_json_object(folder, text):
    (folder / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"^a.json: "):
        opened(folder)


def test_a_source_travels_to_worker_processes(folder):
    write(folder)
    source = opened(folder)
    copy = pickle.dumps(source)
    assert pickle.loads(copy)[1] == source[1]


@needs_shared
def test_real_files():
    folder = SHARED / "coco"
    for split, pictures in (("train2017", 40), ("val2017", 20)):
        path = f"annotations/captions_{split}.json"
        document = json.loads((folder / path).read_text())
        pair = open_source(folder, "pair", source="coco-captions", path=path, images=split)
        image = open_source(folder, "image", source="coco-captions", path=path, images=split)
        assert (len(pair), len(image)) == (5 * pictures, pictures)
        assert list(pair.texts()) == [annotation["caption"] for annotation in document["annotations"]]
        names = {entry["id"]: entry["file_name"] for entry in document["images"]}
        for index in (0, len(pair) - 1):
            name = names[document["annotations"][index]["image_id"]]
            assert pair[index].image == (folder / split / name).read_bytes() == image[pair[index].image_id].image
        assert sorted(e.image_id for e in pair.records()) == sorted(list(range(pictures)) * 5)
