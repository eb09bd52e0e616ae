import pickle
import sys
from types import SimpleNamespace

import pytest

from tests.data.files_support import jpeg, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError

QUESTIONS = [
    ("what shape is in the image?", "circle", 1),
    ("is there a circle?", "yes", 1),
    ("is there a blue shape?", "no", 0),
    ("what color is the shape?", "red", 2),
    ("is there no circle?", "no", 10),
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that looks like easy-vqa, with four pictures."""
    paths = {}
    for image in (10, 2, 1, 0):
        paths[image] = str(tmp_path / f"{image}.png")
        (tmp_path / f"{image}.png").write_bytes(jpeg(size=(8, 8 + image)))
    columns = tuple(list(column) for column in zip(*QUESTIONS, strict=True))
    module = SimpleNamespace(
        get_train_questions=lambda: columns,
        get_train_image_paths=lambda: paths,
        get_test_questions=lambda: tuple(column[-1:] for column in columns),
        get_test_image_paths=lambda: paths,
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", module)
    return paths


def opened(folder, **fields):
    return open_source(folder, "pair", source="easy-vqa", **fields)


def test_questions_and_repeated_answers(package, tmp_path):
    source = opened(tmp_path)
    assert isinstance(source, LabelledSource)
    examples = [source[i] for i in range(len(source))]
    assert [(e.text, e.facts["answer"], e.image_id) for e in examples] == QUESTIONS
    assert [e.image for e in examples] == [jpeg(size=(8, 8 + image)) for *_, image in QUESTIONS]
    assert [e.name for e in examples][:2] == ["easy-vqa/train:question 0", "easy-vqa/train:question 1"]
    assert examples[0].facts == {
        "id": 0,
        "answers": ("circle",) * 10,
        "answer": "circle",
        "answer_type": "other",
        "question_type": "what shape",
    }
    assert [e.facts["answer_type"] for e in examples] == ["other", "yes/no", "yes/no", "other", "yes/no"]
    assert [e.text for e in source.records()] == list(source.texts()) == [text for text, *_ in QUESTIONS]
    assert all(e.image is None for e in source.records())
    assert pickle.loads(pickle.dumps(source))[3] == examples[3]
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            source[outside]


def test_parts_share_no_picture_and_keep_the_numbers(package, tmp_path):
    parts = [list(opened(tmp_path, part=part).records()) for part in ((0, 0.5), (0.5, 0.75), (0.75, 1))]
    assert [{e.image_id for e in part} for part in parts] == [{0, 1}, {2}, {10}]
    assert [[e.facts["id"] for e in part] for part in parts] == [[0, 1, 2], [3], [4]]


def test_the_test_split(package, tmp_path):
    source = opened(tmp_path, split="test")
    assert [(e.name, e.text) for e in source.records()] == [("easy-vqa/test:question 0", "is there no circle?")]


def test_mistakes(package, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="an easy-vqa source has no examples for the image stream"):
        open_source(tmp_path, "image", source="easy-vqa")
    with pytest.raises(DataError, match=r"part \(0.0, 0.1\) of easy-vqa's 4 train pictures holds none"):
        opened(tmp_path, part=(0, 0.1))
    with pytest.raises(ValueError, match="part must be two numbers"):
        opened(tmp_path, part=(0.5, 0.5))
    source = opened(tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"^easy-vqa/train:question 3: there is no file .*2.png"):
        source[3]
    del package[2]
    with pytest.raises(DataError, match=r"lacks the train picture 2 \(1 in all\); install it again"):
        opened(tmp_path)
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DataError, match=r"needs the easy-vqa package: pip install 'vlmoe\[easy-vqa\]'"):
        opened(tmp_path)


def test_the_package_itself(tmp_path):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is absent")
    train, test = opened(tmp_path), opened(tmp_path, split="test")
    assert (len(train), len(test)) == (38_575, 9_673)
    records = list(train.records())
    assert len({e.image_id for e in records}) == 4_000
    assert len({e.facts["answer"] for e in records}) == 13
    assert sum(e.facts["answer"] == "yes" for e in test.records()) / len(test) == pytest.approx(0.373, abs=5e-4)
    held_out = opened(tmp_path, part=(0.9, 1))
    assert {e.image_id for e in held_out.records()} == set(range(3_600, 4_000))
    assert held_out[0].image.startswith(b"\x89PNG") and records[0].text == "what is the blue shape?"
