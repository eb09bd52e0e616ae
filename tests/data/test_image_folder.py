import pickle

import pytest

from tests.data.files_support import jpeg, open_source
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError


@pytest.fixture
def root(tmp_path):
    for name in ("photos/dog/2.jpg", "photos/cat/deep/1.JPG", "photos/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "photos/dog/2.txt").write_text(" a dog\n")
    (tmp_path / "photos/.hidden.jpg").write_bytes(b"")
    return tmp_path


def test_pictures_are_sorted_and_folders_are_classes(root):
    source = open_source(root, "image", source="image-folder", path="photos")
    examples = [source[i] for i in range(len(source))]
    assert [e.name for e in examples] == ["photos/0.png", "photos/cat/deep/1.JPG", "photos/dog/2.jpg"]
    assert [e.facts for e in examples] == [
        {"id": "0.png"},
        {"id": "cat/deep/1.JPG", "label": "cat/deep"},
        {"id": "dog/2.jpg", "label": "dog"},
    ]
    assert [e.image_id for e in examples] == [0, 1, 2]
    assert all(e.image == jpeg() and e.text is None for e in examples)
    assert sum(source.blocks) == 3
    assert pickle.loads(pickle.dumps(source))[2] == examples[2]


def test_captions_stand_beside(root):
    source = open_source(root, "pair", source="image-folder", path="photos")
    assert source[2].text == "a dog"
    with pytest.raises(DataError, match=r"photos/0.png: there is no file .*0.txt"):
        source[0]
    assert list(source.texts()) == ["a dog"]


def test_records_have_no_pictures(root):
    image = open_source(root, "image", source="image-folder", path="photos")
    assert isinstance(image, LabelledSource)
    assert [(e.facts, e.image, e.image_id) for e in image.records()] == [(image[i].facts, None, i) for i in range(3)]
    pair = open_source(root, "pair", source="image-folder", path="photos")
    assert [(e.text, e.image_id) for e in pair.records()] == [("a dog", 2)]


def test_one_level(root):
    source = open_source(root, "image", source="image-folder", path="photos", recursive=False)
    assert [source[i].name for i in range(len(source))] == ["photos/0.png"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("no", "nothing matches 'no'.*data.root"), ("photos/0.png", "is a file"), ("empty", "no pictures in")],
)
def test_wrong_paths(root, path, reason):
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        open_source(root, "image", source="image-folder", path=path)


def test_outside_the_range(root):
    source = open_source(root, "image", source="image-folder", path="photos")
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


SYNSETS = ("n02 tench, Tinca tinca", "n01 goldfish", "n03")
"""In an order of its own, as that of the development kit."""


@pytest.fixture
def imagenet(tmp_path):
    """Both layouts of ILSVRC."""
    for name in ("train/n02/n02_1.JPEG", "train/n01/n01_7.JPEG", "train/n01/n01_8.JPEG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "val").mkdir()
    for number in (2, 1, 3):
        (tmp_path / "val" / f"ILSVRC2012_val_0000000{number}.JPEG").write_bytes(jpeg())
    (tmp_path / "synsets.txt").write_text("\n".join(SYNSETS) + "\n\n")
    return tmp_path


def labels(folder, **fields):
    source = open_source(folder, "image", source="image-folder", **fields)
    return [source[i].facts["label"] for i in range(len(source))]


def test_folders_of_imagenet(imagenet):
    assert labels(imagenet, path="train", classes="synsets.txt") == ["n01", "n01", "n02"]
    (imagenet / "synsets.txt").write_text("n02\nn03\n")
    with pytest.raises(DataError, match=r"^train/n01/n01_8.JPEG: 'n01' is no class of the list .* of 2; did you mean"):
        labels(imagenet, path="train", classes="synsets.txt")
    with pytest.raises(DataError, match=r"^val/ILSVRC2012_val_00000003.JPEG: lies in no folder .*give `labels`"):
        labels(imagenet, path="val", classes="synsets.txt")


def test_numbers_of_imagenet_validation_pictures(imagenet):
    (imagenet / "truth.txt").write_text("3\n1\n2\n")
    assert labels(imagenet, path="val", classes="synsets.txt", labels="truth.txt") == ["n03", "n02", "n01"]


def test_names_of_imagenet_validation_pictures(imagenet):
    lines = [f"ILSVRC2012_val_0000000{number}.JPEG n0{number}" for number in (3, 1, 2)]
    (imagenet / "val.txt").write_text("\n".join(lines))
    assert labels(imagenet, path="val", labels="val.txt") == ["n01", "n02", "n03"]
    source = open_source(imagenet, "image", source="image-folder", path="val", labels="val.txt", classes="synsets.txt")
    assert next(iter(source.records())).facts == {"id": "ILSVRC2012_val_00000001.JPEG", "label": "n01"}
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_files_of_classes_that_are_missing(imagenet):
    with pytest.raises(DataError, match=r"^no.txt: can't be read: No such file"):
        labels(imagenet, path="train", classes="no.txt")
    with pytest.raises(DataError, match=r"^no.txt: can't be read: No such file"):
        labels(imagenet, path="val", labels="no.txt")
