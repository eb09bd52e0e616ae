import pickle

import pytest

from tests.data.files_support import jpeg, open_source
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
    assert [dict(e.facts) for e in examples] == [{}, {"class": "cat/deep"}, {"class": "dog"}]
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
