import json
import pickle

import pytest

from tests.data.files_support import SHARED, jpeg, needs_shared, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError

VQA = {"image_path": "red.jpg", "text_segment": [17, 4, 9], "labels": [2, 0], "scores": [1.0, 0.3], "qid": 42}
NLVR2 = {
    "image_path": "red.jpg",
    "image2_path": "green.jpg",
    "text_segment": [5],
    "label": 1,
    "identifier": "dev-850-0-0",
}
CAPTION = {"image_path": "red.jpg", "text_segment": [5, 6], "image_id": 0}
CLASS = {"image_path": "red.jpg", "label": 1}


@pytest.fixture
def folder(tmp_path):
    for place, color in (("photos", "red"), ("photos", "green"), (".", "red")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / f"{color}.jpg").write_bytes(jpeg("blue" if place == "." else color))
    answers = [{"answer": answer, "label": number} for number, answer in enumerate(("net", "yes", "2 dogs"))]
    write(tmp_path, *answers, name="answer2label.txt")
    return tmp_path


def write(folder, *records, name="a.jsonl"):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n")


def opened(folder, stream="pair", path="a.jsonl", **fields):
    return open_source(folder, stream, source="beit3", path=path, **{"images": "photos"} | fields)


def test_vqa(folder):
    write(folder, VQA, {**VQA, "labels": [], "scores": [], "qid": 43})
    source = opened(folder, answers="answer2label.txt")
    example = source[0]
    assert isinstance(source, LabelledSource)
    assert (example.name, example.text, example.text_ids) == ("a.jsonl:1", None, (17, 4, 9))
    assert (example.image, example.more_images, example.image_id) == (jpeg("red"), (), 0)
    assert dict(example.facts) == {"id": 42, "scores": {"2 dogs": 1.0, "net": 0.3}}
    assert (dict(source[1].facts), source[1].image_id) == ({"id": 43}, 0)
    assert [(e.text_ids, e.facts["id"], e.image) for e in source.records()] == [
        ((17, 4, 9), 42, None),
        ((17, 4, 9), 43, None),
    ]
    assert list(source.texts()) == []
    assert pickle.loads(pickle.dumps(source))[0] == example
    with pytest.raises(IndexError):
        source[2]


def test_nlvr2(folder):
    write(folder, NLVR2, {**NLVR2, "label": 0}, {k: v for k, v in NLVR2.items() if k != "label"})
    source = opened(folder)
    assert (source[0].image, source[0].more_images) == (jpeg("red"), (jpeg("green"),))
    assert [dict(source[i].facts) for i in range(3)] == [
        {"id": "dev-850-0-0", "label": "True"},
        {"id": "dev-850-0-0", "label": "False"},
        {"id": "dev-850-0-0"},
    ]
    with pytest.raises(DataError, match=r"^a.jsonl:1: has two pictures .*name it under 'pair'"):
        opened(folder, "image")[0]


def test_retrieval(folder):
    green = {"image_path": "green.jpg", "text_segment": "a réd card", "image_id": 1}
    write(folder, CAPTION, {**CAPTION, "text_segment": [7]}, green)
    write(folder, CAPTION, name="b.jsonl")
    pair = opened(folder, path=["a.jsonl", "b.jsonl"])
    assert [(e.text_ids, e.text, e.image_id, dict(e.facts)) for e in map(pair.__getitem__, range(4))] == [
        ((5, 6), None, 0, {}),
        ((7,), None, 0, {}),
        (None, "a réd card", 2, {}),
        ((5, 6), None, 3, {}),
    ]
    assert pair.blocks == [3, 1] and list(pair.texts()) == ["a réd card"]
    image = opened(folder, "image", path=["a.jsonl", "b.jsonl"])
    assert [(image[i].image_id, image[i].image, image[i].text_ids) for i in range(len(image))] == [
        (0, jpeg("red"), None),
        (2, jpeg("green"), None),
        (3, jpeg("red"), None),
    ]
    text = opened(folder, "text")
    assert [(text[i].text_ids, text[i].image_id, text[i].image) for i in (1, 2)] == [((7,), -1, None), (None, -1, None)]


def test_imagenet(folder):
    write(folder, CLASS, {"image_path": "green.jpg", "label": 0})
    (folder / "synsets.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    source = opened(folder, "image")
    assert [dict(e.facts) for e in source.records()] == [
        {"label": "1", "id": "red.jpg"},
        {"label": "0", "id": "green.jpg"},
    ]
    assert source[1].image == jpeg("green")
    named = opened(folder, "image", classes="synsets.txt")
    assert [e.facts["label"] for e in named.records()] == ["n01443537", "n01440764"]
    with pytest.raises(DataError, match=r"^a.jsonl:1: 'text_segment' must be a list of token ids"):
        opened(folder)[0]


def test_pictures_start_from_the_root_unless_a_folder_is_named(folder):
    write(folder, CAPTION)
    assert opened(folder, images=".")[0].image == jpeg("blue")
    assert open_source(folder, "pair", source="beit3", path="a.jsonl")[0].image == jpeg("blue")


@pytest.mark.parametrize(
    ("record", "stream", "reason"),
    [
        ("{", "pair", "is no JSON"),
        ({**CAPTION, "image_path": "none.jpg"}, "pair", "there is no file .*photos/none.jpg"),
        ({**CAPTION, "image_path": "../red.jpg"}, "pair", "leads out of"),
        ({"text_segment": [5]}, "pair", "'image_path' must name a picture, not None"),
        ({**NLVR2, "image2_path": "none.jpg"}, "pair", "there is no file .*none.jpg"),
        ({**CAPTION, "text_segment": []}, "text", "'text_segment' must be a list of token ids, or a text"),
        ({**CAPTION, "text_segment": None}, "text", "'text_segment' must be"),
        ({**CAPTION, "text_segment": [5, -1]}, "text", "'text_segment' must be"),
        ({**CAPTION, "text_segment": [5, 1.5]}, "text", "'text_segment' must be"),
        ({**CAPTION, "text_segment": [True]}, "text", "'text_segment' must be"),
        ({**CAPTION, "text_segment": " "}, "text", "'text_segment' is empty"),
        ({**VQA, "labels": [0, 3]}, "pair", r"no answer with label 3 \(known: 0..2\)"),
        ({**VQA, "labels": [0, -1]}, "pair", r"no answer with label -1"),
        ({**VQA, "scores": [1.0]}, "pair", "'labels' and 'scores' must be two lists of numbers, of equal length"),
        ({**VQA, "labels": "yes"}, "pair", "'labels' and 'scores' must be"),
        ({**NLVR2, "label": 2}, "pair", r"'label' must be 1 \(true\) or 0 \(false\), not 2"),
        ({**NLVR2, "label": "True"}, "pair", "not 'True'"),
        ({"image_path": "blue.jpg", "label": -1}, "image", "'label' must be the number of a class, not -1"),
        ({"image_path": "blue.jpg", "label": "cat"}, "image", "'label' must be the number of a class, not 'cat'"),
    ],
)
def test_a_broken_line_is_one_example_that_raises(folder, record, stream, reason):
    write(folder, CAPTION, record, {**CAPTION, "image_path": "green.jpg"})
    source = opened(folder, stream, answers="answer2label.txt")
    assert len(source) == 3 and source[2].name == "a.jsonl:3"
    with pytest.raises(DataError, match=f"^a.jsonl:2: .*{reason}"):
        source[1]
    if "no file" not in reason and "leads" not in reason and "name a picture" not in reason:
        assert [e.name for e in source.records()] == ["a.jsonl:1", "a.jsonl:3"]


def test_answer_and_class_lists(folder):
    write(folder, VQA)
    with pytest.raises(DataError, match=r"^a.jsonl:1: holds answers by number; .*'answers: answer2label.txt'"):
        opened(folder)[0]
    write(folder, {"answer": "yes", "label": 0}, {"answer": "no", "label": 5}, name="wrong.txt")
    with pytest.raises(DataError, match=r"^wrong.txt:2: must have an answer and label 1, not 'no' and 5"):
        opened(folder, answers="wrong.txt")
    (folder / "classes.txt").write_text("cat\n")
    write(folder, CLASS)
    with pytest.raises(DataError, match=r"^a.jsonl:1: .*number of a class \(known: 0..0\), not 1"):
        opened(folder, "image", classes="classes.txt")[0]
    with pytest.raises(DataError, match="must name one file, not 3"):
        opened(folder, answers="*.txt")


@needs_shared
def test_an_index_of_real_photographs(tmp_path):
    """Token ids and running numbers as the index of Karpathy's test split has them."""
    folder = SHARED / "coco"
    entries = [i for i in json.loads((folder / "dataset_coco.json").read_text())["images"] if i["split"] == "test"]
    write(
        tmp_path,
        *(
            {"image_path": f"{e['filepath']}/{e['filename']}", "text_segment": [number, nth], "image_id": number}
            for number, e in enumerate(entries)
            for nth in range(len(e["sentences"]))
        ),
        name="coco_retrieval.test.jsonl",
    )
    source = open_source(folder, "pair", source="beit3", path=str(tmp_path / "coco_retrieval.test.jsonl"))
    assert len(source) == 50
    assert len({e.image_id for e in source.records()}) == len(entries) == 10
    assert all(source[i].text_ids == (i // 5, i % 5) for i in (0, 7, 49))
    assert source[49].image == (folder / entries[-1]["filepath"] / entries[-1]["filename"]).read_bytes()
