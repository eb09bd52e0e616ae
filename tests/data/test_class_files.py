import pytest

from vlmoe_core.data.class_files import answer_list, checked_class, class_list, picture_labels
from vlmoe_core.errors import DataError

PICTURES = ("a b.jpg", "c.jpg")
CLASSES = ("cat", "dog", "hen")


@pytest.fixture
def write(tmp_path):
    def _write(content):
        path = tmp_path / "x.txt"
        path.write_bytes(content)
        return path

    return _write


def test_a_class_is_the_first_word_of_a_line(write):
    assert class_list(write(b"n01 tench, Tinca\r\n\n t-shirt \nn02\n"), "x.txt") == ("n01", "t-shirt", "n02")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "x.txt: holds no class"),
        (b"cat\ndog\n\ncat x\n", "x.txt:4: the class 'cat' stands in line 1 too"),
        (b"cat\n\xff\n", "x.txt:2: is not valid UTF-8"),
    ],
)
def test_a_wrong_list_of_classes(write, content, reason):
    with pytest.raises(DataError, match=f"^{reason}"):
        class_list(write(content), "x.txt")


def test_a_class_outside_of_the_list():
    assert checked_class("yak", None, "w") == "yak" and checked_class("dog", CLASSES, "w") == "dog"
    with pytest.raises(DataError, match=r"^w: 'dogs' is no class of the list \(classes\) of 3; did you mean 'dog'"):
        checked_class("dogs", CLASSES, "w")
    with pytest.raises(DataError, match="of 1000; it begins with n0, n1, n2"):
        checked_class("dogs", [f"n{i}" for i in range(1000)], "w")


@pytest.mark.parametrize(
    "content", [b"c.jpg dog\n\na b.jpg\tcat", b"a b.jpg  cat\nc.jpg dog\n", b"1\n2\n", b"1\r\n\r\n2"]
)
def test_labels_by_name_and_by_number(write, content):
    assert picture_labels(write(content), PICTURES, CLASSES, "x.txt") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "classes", "reason"),
    [
        (b"a b.jpg cat\nd.jpg dog", CLASSES, "x.txt:2: 'd.jpg' is no picture of the folder"),
        (b"a b.jpg cat\nc.jpg", CLASSES, "x.txt:2: 'c.jpg' is no picture .*; a line is NAME CLASS"),
        (b"a b.jpg cat", CLASSES, "x.txt: has no line for the picture 'c.jpg'"),
        (b"c.jpg cat\nc.jpg dog", CLASSES, "x.txt:2: the picture 'c.jpg' has a label already"),
        (b"a b.jpg cat\nc.jpg cow", CLASSES, "x.txt:2: 'cow' is no class of the list"),
        (b"1\n2\n", None, r"x.txt: holds numbers of classes; name the list .*\(classes\)"),
        (b"1\n2\n3\n", CLASSES, "x.txt: has 3 lines for 2 pictures"),
        (b"", CLASSES, "x.txt: has 0 lines for 2 pictures"),
        (b"1\n4\n", CLASSES, "x.txt:2: '4' is no number from 1 to 3"),
        (b"1\n0\n", CLASSES, "x.txt:2: '0' is no number from 1 to 3"),
        (b"1\ncat\n", CLASSES, "x.txt:2: 'cat' is no number"),
    ],
)
def test_wrong_labels(write, content, classes, reason):
    with pytest.raises(DataError, match=f"^{reason}"):
        picture_labels(write(content), PICTURES, classes, "x.txt")


def test_answers_stand_in_label_order(write):
    lines = b'{"answer": "net", "label": 0}\n\n{"answer": "2 dogs", "label": 1, "more": 3}\n'
    assert answer_list(write(lines), "x.txt") == ("net", "2 dogs")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "x.txt: holds no answer"),
        (b'{"answer": "net", "label": 0}\n{"answer": "yes", "label": 2}', "x.txt:2: .* label 1, not 'yes' and 2"),
        (b'{"answer": "net", "label": false}', "x.txt:1: .* label 0, not 'net' and False"),
        (b'{"label": 0}', "x.txt:1: must have an answer and label 0, not None and 0"),
        (b"net\n", "x.txt:1: is no JSON"),
        (b"[]\n", r"x.txt:1: is no JSON object"),
    ],
)
def test_a_list_without_order_or_answers_is_refused(write, content, reason):
    with pytest.raises(DataError, match=f"^{reason}"):
        answer_list(write(content), "x.txt")


def test_a_missing_answer_list_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"^x.txt: can't be read: No such file"):
        answer_list(tmp_path / "x.txt", "x.txt")
