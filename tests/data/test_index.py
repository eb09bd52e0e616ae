import multiprocessing
import os
import stat

import numpy as np
import pytest

from vlmoe_core.data.index import Numbering, cache_folder, load_index
from vlmoe_core.errors import DataError


def counting_build(calls):
    def build(path):
        calls.append(path.name)
        return {"size": np.array([len(line) for line in path.read_text().split()], dtype=np.int64)}

    return build


def test_numbering_equals_a_double_loop():
    counts = [2, 0, 1, 3, 0]
    numbering = Numbering(np.array(counts))
    expected = [(record, nth) for record, count in enumerate(counts) for nth in range(count)]
    assert [numbering.locate(i) for i in range(len(numbering))] == expected
    for outside in (-1, len(numbering)):
        with pytest.raises(IndexError):
            numbering.locate(outside)


def test_the_index_joins_files(tmp_path):
    (tmp_path / "a").write_text("x yy")
    (tmp_path / "b").write_text("")
    (tmp_path / "c").write_text("zzz")
    files = [tmp_path / name for name in "abc"]
    index = load_index(files, "test", (), counting_build([]))
    assert index.columns["size"].tolist() == [1, 2, 3]
    assert [index.path(r).name for r in range(3)] == ["a", "a", "c"]
    assert [index.first_of_file(r) for r in range(3)] == [0, 0, 2]
    assert index.blocks(np.array([2, 3, 4])) == [5, 4]


def test_a_file_is_indexed_again_only_when_it_or_the_options_change(tmp_path):
    path, calls = tmp_path / "a", []
    path.write_text("x yy")
    build = counting_build(calls)
    for options in ((), (), ("other",), ("other",)):
        load_index([path], "test", options, build)
    assert len(calls) == 2
    path.write_text("x yy zzz")
    assert len(load_index([path], "test", (), build)) == 3
    os.utime(path, ns=(1, 1))
    load_index([path], "test", (), build)
    assert len(calls) == 4


def test_a_damaged_cache_is_built_again(tmp_path, index_cache):
    path, calls = tmp_path / "a", []
    path.write_text("x yy")
    build = counting_build(calls)
    load_index([path], "test", (), build)
    (cached,) = index_cache.rglob("*.npz")
    for content in (cached.read_bytes()[:50], b"", b"junk"):
        cached.write_bytes(content)
        assert load_index([path], "test", (), build).columns["size"].tolist() == [1, 2]
    assert len(calls) == 4


def test_a_broken_write_leaves_no_index(tmp_path, index_cache, monkeypatch):
    path = tmp_path / "a"
    path.write_text("x")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"No space left.*VLMOE_CACHE"):
        load_index([path], "test", (), counting_build([]))
    assert list(index_cache.rglob("*.npz")) == []


def test_data_folders_may_be_read_only(tmp_path):
    path = tmp_path / "data" / "a"
    path.parent.mkdir()
    path.write_text("x")
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert len(load_index([path], "test", (), counting_build([]))) == 1
    path.parent.chmod(stat.S_IRWXU)
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_the_cache_folder_is_an_environment_variable(monkeypatch, index_cache):
    assert cache_folder() == index_cache
    monkeypatch.delenv("VLMOE_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "vlmoe")


def test_files_without_records_are_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(DataError, match=r"no examples.*/a"):
        load_index([tmp_path / "a"], "test", (), counting_build([]))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")

    def build(file):
        file.write_text("x y z")
        return {"size": np.array([1])}

    with pytest.raises(DataError, match="changed while"):
        load_index([path], "test", (), build)


def _load(path):
    return load_index([path], "test", (), counting_build([])).columns["size"].tolist()


def test_processes_may_index_at_the_same_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("x " * 1000)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_load, [path] * 8) == [[1] * 1000] * 8
