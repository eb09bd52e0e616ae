import gzip
import json
import os
import pickle
import re
import tarfile

import pytest

from tests.data.files_support import SHARED, files_below, jpeg, needs_shared, open_source, write_tar
from vlmoe_core.data import files
from vlmoe_core.data.example import LabelledSource
from vlmoe_core.errors import DataError


def described(*captions):
    return json.dumps({"captions": list(captions)}).encode()


def opened(folder, stream="pair", **fields):
    return open_source(folder, stream, source="tar", **({"path": "*.tar", "text_field": "captions"} | fields))


def broken(source):
    """Message of each example, or its name."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index].name)
        except DataError as error:
            found.append(f"! {error}")
    return found


@pytest.fixture
def folder(tmp_path):
    members = {"1.jpg": jpeg("red"), "1.json": described("a", "b"), "2.png": jpeg("green"), "2.txt": b"c\n"}
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", {"./x/3.JPEG": jpeg("blue"), "./x/3.json": described("d")})
    return tmp_path


def test_samples_of_all_shards(folder):
    pair = opened(folder)
    assert [(e.name, e.text, e.image_id) for e in map(pair.__getitem__, range(4))] == [
        ("a.tar:1", "a", 0),
        ("a.tar:1", "b", 0),
        ("a.tar:2", "c", 1),
        ("b.tar:x/3", "d", 2),
    ]
    assert [pair[i].image for i in (0, 2, 3)] == [jpeg("red"), jpeg("green"), jpeg("blue")]
    image = opened(folder, "image")
    assert [(image[i].image_id, image[i].text) for i in range(len(image))] == [(0, None), (1, None), (2, None)]
    text = opened(folder, "text")
    assert [(text[i].image, text[i].image_id) for i in range(4)] == [(None, -1)] * 4
    assert (pair.blocks, image.blocks) == ([3, 1], [2, 1])
    assert list(image.texts()) == ["a", "b", "c", "d"]


def test_folders_are_classes(tmp_path):
    write_tar(tmp_path / "a.tar", {"hat/1.jpg": jpeg(), "shirt/1.jpg": jpeg(), "2.jpg": jpeg()})
    source = opened(tmp_path, "image")
    facts = [{"id": "hat/1", "label": "hat"}, {"id": "shirt/1", "label": "shirt"}, {"id": "2"}]
    assert [source[i].facts for i in range(3)] == facts
    assert isinstance(source, LabelledSource)
    assert [(e.facts, e.image, e.image_id) for e in source.records()] == [(f, None, i) for i, f in enumerate(facts)]


def test_records_leave_out_pictures_and_what_is_broken(folder):
    write_tar(folder / "c.tar", {"4.jpg": jpeg(), "4.json": b"{", "../5.jpg": jpeg(), "6.txt": b"e"})
    pair = opened(folder)
    assert [(e.text, e.image_id, e.image) for e in pair.records()] == [
        ("a", 0, None),
        ("b", 0, None),
        ("c", 1, None),
        ("d", 2, None),
        ("e", 5, None),
    ]
    assert [e.facts["id"] for e in opened(folder, "image").records()] == ["1", "2", "x/3", "4", "6"]
    assert [(e.text, e.facts) for e in opened(folder, "text").records()][3:] == [("d", {}), ("e", {})]


def test_other_members_are_passed_over(tmp_path):
    members = {"1.jpg": jpeg(), "1.mask.png": jpeg(), "1.cls": b"3", "._1.jpg": b"x", "README": b"x"}
    write_tar(tmp_path / "a.tar", members)
    assert broken(opened(tmp_path, "image")) == ["a.tar:1"]


def test_a_name_with_two_dots_is_never_lost_silently(tmp_path):
    write_tar(tmp_path / "a.tar", {"cat/v1.2.jpg": jpeg()})
    assert "two dots" in broken(opened(tmp_path, "image"))[0]


def test_what_is_missing_matters_to_the_streams_that_need_it(tmp_path):
    write_tar(
        tmp_path / "a.tar", {"1.jpg": jpeg(), "2.json": described("x"), "3.jpg": jpeg(), "3.json": b'{"captions": '}
    )
    assert broken(opened(tmp_path, "image")) == ["a.tar:1", broken(opened(tmp_path))[1], "a.tar:3"]
    pair, text = broken(opened(tmp_path)), broken(opened(tmp_path, "text"))
    assert "a.tar:1: has neither a .json nor a .txt" in pair[0]
    assert "a.tar:2: has no picture" in pair[1]
    assert "a.tar:3.json: is no JSON" in pair[2]
    assert text == [pair[0], "a.tar:2", pair[2]]
    assert list(opened(tmp_path).texts()) == ["x"]


def link(path, kind, target):
    with tarfile.open(path, "w") as archive:
        for name, member_kind in (("1.jpg", tarfile.REGTYPE), ("2.jpg", kind), ("3.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = member_kind, target
            archive.addfile(info)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "is a link to '/etc/passwd'"),
        (tarfile.LNKTYPE, "is a link to '/etc/passwd'"),
        (tarfile.FIFOTYPE, "not a plain file"),
        (tarfile.CHRTYPE, "not a plain file"),
    ],
)
def test_links_and_devices_are_refused(tmp_path, kind, reason):
    link(tmp_path / "a.tar", kind, "/etc/passwd")
    found = broken(opened(tmp_path, "image"))
    assert found[0] == "a.tar:1" and reason in found[1] and found[2] == "a.tar:3"


@pytest.mark.parametrize("name", ["../2.jpg", "/2.jpg", "a/../../2.jpg"])
def test_names_that_climb_out_are_refused_and_nothing_is_written(tmp_path, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    write_tar(inner / "a.tar", {"1.jpg": jpeg(), name: jpeg(), "3.jpg": jpeg()})
    before = files_below(tmp_path)
    found = broken(opened(inner, "image"))
    assert found[0] == "a.tar:1" and "leads out of the archive" in found[1] and found[2] == "a.tar:3"
    assert files_below(tmp_path) == before


def test_a_key_that_stands_twice_is_broken_once(tmp_path):
    with tarfile.open(write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(), "2.jpg": jpeg()}), "a") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"))
    assert [m[:40] for m in broken(opened(tmp_path, "image"))] == [
        "! a.tar:1: this key stands in the archiv",
        "a.tar:2",
    ]


@pytest.mark.parametrize("cut", [1, 500, 700, 1400, 2600])
def test_a_cut_archive_never_loses_samples_silently(tmp_path, cut):
    """Whole samples are read; whatever byte the cut falls on, something says so."""
    members = {f"{i}.jpg": jpeg(size=(8, 8)).ljust(700, b"\0") for i in range(3)}
    data = write_tar(tmp_path / "a.tar", members).read_bytes()[: 3 * 1536]
    (tmp_path / "a.tar").write_bytes(data[:-cut])
    found = broken(opened(tmp_path, "image"))
    whole = sum(not message.startswith("!") for message in found)
    lost = 0 if cut < 1536 - 512 - 700 else 1 if cut <= 1536 + 1536 - 512 - 700 else 2
    assert whole == 3 - lost
    assert len(found) > whole


def test_a_damaged_header_is_named(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", {f"{i}.jpg": jpeg() for i in range(3)}).read_bytes())
    second = data.index(b"1.jpg")
    data[second : second + 100] = b"x" * 100
    (tmp_path / "a.tar").write_bytes(data)
    found = broken(opened(tmp_path, "image"))
    assert found[0] == "a.tar:0" and "damaged" in found[1] and f"byte {second}" in found[1]


def test_what_is_no_tar_is_one_broken_example(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(gzip.compress(write_tar(tmp_path / "c.tar", {"1.jpg": jpeg()}).read_bytes()))
    (tmp_path / "d.tar").write_bytes(b"hello" * 1000)
    found = broken(opened(tmp_path, "image"))
    for message, reason in zip(found, ["a.tar.*empty", "b.tar.*gzip", "^c.tar:1$", "d.tar.*damaged"], strict=True):
        assert re.search(reason, message)


def test_handles_stay_few_and_do_not_travel(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 3)
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", {"1.jpg": jpeg()})
    source = opened(tmp_path, "image")
    examples = [source[i] for i in range(8)]
    assert len(source._reader._handles) == 3
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy._reader._handles) == 0
    assert [copy[i] for i in range(8)] == examples
    handle = next(iter(copy._reader._handles.values()))
    del copy
    with pytest.raises(OSError):
        os.fstat(handle)


@needs_shared
def test_flickr8k_shard():
    source = opened(SHARED / "flickr8k", path="flickr8k-dev-*.tar")
    assert len(source) == 5000 and source.blocks == [5000]
    assert source[7].image_id == source[5].image_id == 1
    lines = (json.loads(line) for line in (SHARED / "flickr8k" / "captions.jsonl").open())
    assert list(source.texts()) == [text for line in lines if line["split"] == "dev" for text in line["captions"]]


@needs_shared
@pytest.mark.parametrize(("split", "count"), [("train", 3068), ("val", 341)])
def test_clothing_classes(split, count):
    source = opened(SHARED / "clothing", "image", path=f"clothing-{split}.tar")
    records = list(source.records())
    assert len(source) == len(records) == len({e.facts["id"] for e in records}) == count
    assert sorted({e.facts["label"] for e in records}) == (SHARED / "clothing" / "classes.txt").read_text().split()
    assert [source[i].facts for i in (0, count - 1)] == [records[0].facts, records[-1].facts]
