import json
import pickle

import numpy as np
import pytest

from tests.data.files_support import SHARED, jpeg, needs_shared, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError

FIELDS = {"source": "vqa", "questions": "q.json", "annotations": "a.json", "images": "photos/{image_id:03d}.jpg"}


def question(number, image=7, text="what colour é ?"):
    return {"image_id": image, "question": text, "question_id": number}


def annotation(number, image=7, answers=("red", "dark red"), **more):
    entries = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)]
    return {"question_id": number, "image_id": image, "answers": entries, "multiple_choice_answer": answers[0], **more}


def write(folder, questions, annotations, indent=None):
    """Both files, ids as in the official ones: other members stand before the list and behind it."""
    for file, name, items in (("q.json", "questions", questions), ("a.json", "annotations", annotations)):
        document = {"info": {name: [1], "é": '"]}'}, name: items, "data_type": "x"}
        (folder / file).write_text(json.dumps(document, indent=indent, ensure_ascii=False), "utf-8")


def opened(folder, **fields):
    return open_source(folder, "pair", **FIELDS | fields)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for image in (7, 900):
        (tmp_path / "photos" / f"{image:03d}.jpg").write_bytes(jpeg(size=(8, image)))
    types = {"answer_type": "other", "question_type": "what"}
    write(
        tmp_path,
        [question(41), question(5, 900, "is it ?"), question(42)],
        [annotation(5, 900, ("yes",) * 10), annotation(42), annotation(41, **types)],
    )
    return tmp_path


def test_questions_meet_their_annotations_whatever_their_order(folder):
    source = opened(folder)
    examples = [source[i] for i in range(len(source))]
    assert [e.name for e in examples] == [f"q.json:question {number}" for number in (41, 5, 42)]
    assert [e.text for e in examples] == ["what colour é ?", "is it ?", "what colour é ?"]
    assert [e.image_id for e in examples] == [0, 1, 0]
    assert [e.image for e in examples] == [jpeg(size=(8, size)) for size in (7, 900, 7)]
    answered = {"answers": ("red", "dark red"), "answer": "red"}
    assert [e.facts for e in examples] == [
        {"id": 41, **answered, "answer_type": "other", "question_type": "what"},
        {"id": 5, "answers": ("yes",) * 10, "answer": "yes"},
        {"id": 42, **answered},
    ]
    assert sum(source.blocks) == 3
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            source[outside]


@pytest.mark.parametrize("indent", [None, 3])
def test_files_with_a_byte_order_mark_and_any_blanks(folder, indent):
    write(folder, [question(1, text="ü" * 50), question(2, text="last €")], [annotation(1), annotation(2)], indent)
    for name in ("q.json", "a.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert list(opened(folder).texts()) == ["ü" * 50, "last €"]


def test_records_leave_out_pictures_and_what_is_broken(folder):
    write(
        folder,
        [question(1), question(2, text=" "), question(3, 8)],
        [annotation(n, 8 if n == 3 else 7) for n in (1, 2, 3)],
    )
    source = opened(folder)
    assert isinstance(source, LabelledSource)
    assert [(e.facts["id"], e.image, e.image_id) for e in source.records()] == [(1, None, 0), (3, None, 1)]
    with pytest.raises(DataError, match=r"^q.json:question 2: 'question' is empty"):
        source[1]


def test_a_test_set_has_no_answers(folder):
    source = opened(folder, annotations=None)
    assert [source[i].facts for i in range(3)] == [{"id": 41}, {"id": 5}, {"id": 42}]


def test_several_files(folder):
    for name in ("q", "a"):
        (folder / f"{name}2.json").write_text(
            (folder / f"{name}.json").read_text("utf-8").replace('_id": 4', '_id": 6')
        )
    for name, key in (("q2", "questions"), ("a2", "annotations")):
        document = json.loads((folder / f"{name}.json").read_text())
        document[key] = [item for item in document[key] if item["question_id"] != 5]
        (folder / f"{name}.json").write_text(json.dumps(document))
    source = opened(folder, questions=["q.json", "q2.json"], annotations=["a2.json", "a.json"])
    assert source.blocks == [3, 2]
    assert [source[i].facts["id"] for i in range(5)] == [41, 5, 42, 61, 62]


def test_a_source_travels_to_worker_processes(folder):
    source = opened(folder)
    assert source[1] == pickle.loads(pickle.dumps(source))[1]


@pytest.mark.parametrize(
    ("questions", "annotations", "reason"),
    [
        ([1, 2], [1], r"^q.json:question 2: has no annotation \(1 of 2 have none\); .*same split"),
        ([1], [1, 3, 2], r"^a.json:question 3: has no question \(2 of 3 have none\)"),
        ([1, 2, 1], [1, 2], r"^q.json:question 1: .*in 'questions' more than once"),
        ([1, 2], [2, 1, 2], r"^a.json:question 2: .*in 'annotations' more than once"),
        ([1, "2"], [1], r"^q.json: item 2 of 'questions' must have whole numbers .* not '2' and 7"),
        ([2**63], [1], "must have whole numbers"),
        ([True], [1], "must have whole numbers"),
        ([1], [], "no examples"),
    ],
)
def test_files_that_do_not_belong_together(folder, questions, annotations, reason):
    write(folder, [question(n) for n in questions], [annotation(n) for n in annotations])
    with pytest.raises(DataError, match=reason):
        opened(folder)


def test_an_annotation_of_another_picture(folder):
    write(folder, [question(1), question(2)], [annotation(2, image=8), annotation(1)])
    with pytest.raises(DataError, match=r"^q.json:question 2: is about image 7, its annotation about image 8"):
        opened(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no JSON object with a list 'questions'"),
        ("[{}]", "holds no JSON object with a list 'questions'"),
        ('{"info": 1, "data": [2]}', "has no list 'questions'; its fields: info, data"),
        ('{"info": 1', "is no JSON, or was cut: .*line 1"),
        ('{"questions": [{"question_id": 1, "image_id": 2}', "is no JSON, or was cut"),
        ('{"questions": [{"question_id": 1, "image_id": 2},', "is no JSON, or was cut"),
        ('{"questions": [{"question_id": 1, "image_id": 2} {}]}', "is no JSON, or was cut: Expecting ','"),
        ('{"questions": {"question_id": 1}}', r"is no JSON, or was cut: Expecting '\['"),
        ('{"questions": [7]}', r"item 1 of 'questions' is no JSON object"),
        ('{"questions": [{"question_id": 1}]}', "item 1 of 'questions' must have whole numbers .* not 1 and None"),
        ('{"questions": ' + "[" * 100_000, "is no JSON"),
    ],
)
def test_a_broken_file_is_named(folder, content, reason):
    (folder / "q.json").write_text(content)
    with pytest.raises(DataError, match=f"^q.json: {reason}"):
        opened(folder)


@pytest.mark.parametrize(
    ("asked", "answered", "reason"),
    [
        ({"question": 3}, {}, "q.json:question 1: 'question' must hold strings"),
        ({"question": None, "text": "x"}, {}, "q.json:question 1: 'question' must hold strings"),
        ({}, {"answers": []}, r"a.json:question 1: 'answers' must be a list of at least one human answer, not \[\]"),
        ({}, {"answers": None}, "a.json:question 1: 'answers' must be a list"),
        ({}, {"answers": ["red"]}, "a.json:question 1: an answer must be an object .* not 'red'"),
        ({}, {"answers": [{"answer": 4}]}, "a.json:question 1: an answer must be an object"),
        ({}, {"answer_type": 4}, "a.json:question 1: 'answer_type' must be a string, not 4"),
        ({"image_id": 8}, {"image_id": 8}, "q.json:question 1: there is no file .*photos/008.jpg"),
    ],
)
def test_a_broken_question_is_one_example_that_raises(folder, asked, answered, reason):
    write(folder, [question(1) | asked, question(2)], [annotation(2), annotation(1) | answered])
    source = opened(folder)
    assert source[1].facts["id"] == 2
    with pytest.raises(DataError, match=f"^{reason}"):
        source[0]


def test_a_question_without_text(folder):
    write(folder, [{"question_id": 1, "image_id": 7}], [annotation(1)])
    with pytest.raises(
        DataError, match=r"^q.json:question 1: has no field 'question'; its fields: question_id, image_id"
    ):
        opened(folder)[0]


@pytest.mark.parametrize(
    "images", ["x.jpg", "{image}.jpg", "{}.jpg", "{image_id:q}", "{image_id", "{image_id:.0%}x{b}"]
)
def test_a_pattern_that_names_no_picture_is_refused(folder, images):
    with pytest.raises(ValueError, match=r"is no pattern of pictures: it must hold \{image_id\}, as train2014/"):
        opened(folder, images=images)


def test_other_mistakes_of_the_recipe(folder):
    with pytest.raises(DataError, match="a vqa source has no examples for the image stream; name it under 'pair'"):
        open_source(folder, "image", **FIELDS)
    with pytest.raises(ValueError, match="names no file"):
        opened(folder, questions=[])
    with pytest.raises(DataError, match=r"nothing matches 'no.json'"):
        opened(folder, annotations="no.json")


@needs_shared
def test_vqa_v2():
    source = open_source(
        SHARED / "vqa_v2",
        "pair",
        source="vqa",
        questions="v2_OpenEnded_mscoco_train2014_questions.json",
        annotations="v2_mscoco_train2014_annotations.json",
        images="train2014/COCO_train2014_{image_id:012d}.jpg",
    )
    first = source[0]
    assert first.text == "What is this photo taken looking through?" and first.image.startswith(b"\xff\xd8")
    assert [source[i].image_id for i in range(len(source))] == [0, 0, 0]
    assert first.facts["id"] == 458752000 and len(first.facts["answers"]) == 10
    assert (first.facts["answer"], first.facts["question_type"], first.facts["answer_type"]) == (
        "net",
        "what is this",
        "other",
    )


@needs_shared
@pytest.mark.parametrize(("split", "questions", "pictures"), [("train", 4829, 714), ("val", 512, 79)])
def test_daquar(split, questions, pictures):
    source = open_source(
        SHARED / "daquar",
        "pair",
        source="vqa",
        questions=f"v2_OpenEnded_daquar_{split}_questions.json",
        annotations=f"v2_daquar_{split}_annotations.json",
        images=f"images/{split}/DAQUAR_{split}_{{image_id:012d}}.jpg",
    )
    records = list(source.records())
    assert len(source) == len(records) == questions
    assert {e.image_id for e in records} == set(range(pictures))
    document = json.loads((SHARED / "daquar" / f"v2_daquar_{split}_annotations.json").read_text("utf-8"))
    written = {a["question_id"]: [x["answer"] for x in a["answers"]] for a in document["annotations"]}
    assert {e.facts["id"]: list(e.facts["answers"]) for e in records} == written
    numbers = np.linspace(0, questions - 1, 20).astype(int)
    assert all(source[int(i)].image.startswith(b"\xff\xd8") for i in numbers)
