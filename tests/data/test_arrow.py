import builtins
import pickle

import pytest
from pydantic import ValidationError

from tests.data.files_support import jpeg, open_source
from vlmoe_core.errors import DataError


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'vlmoe\[data\]'"):
        open_source(tmp_path, "pair", source="arrow", path="a.parquet")


@pytest.mark.parametrize("fields", [{}, {"path": "a", "hub": "b/c"}])
def test_one_place_is_named(tmp_path, fields):
    with pytest.raises(ValidationError, match="either 'path'"):
        open_source(tmp_path, "pair", source="arrow", **fields)


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="the datasets package (extra data) is absent")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("stored", ["bytes", "record", "feature"])
def test_tables(datasets, tmp_path, kind, stored):
    images = [jpeg("red"), jpeg("green")]
    if stored != "bytes":
        images = [{"bytes": data, "path": None} for data in images]
    columns = {"image": images, "caption": [["a", "b"], ["c"]]}
    table = datasets.Dataset.from_dict(columns)
    if stored == "feature":
        table = table.cast_column("image", datasets.Image())
    if kind == "parquet":
        table.to_parquet(tmp_path / "a.parquet")
    else:
        table.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "a.arrow")
    source = open_source(tmp_path, "pair", source="arrow", path=f"a.{kind}")
    examples = [source[i] for i in range(3)]
    assert [(e.text, e.image_id, e.image) for e in examples] == [
        ("a", 0, jpeg("red")),
        ("b", 0, jpeg("red")),
        ("c", 1, jpeg("green")),
    ]
    assert [e.name for e in examples] == [f"a.{kind}:0", f"a.{kind}:0", f"a.{kind}:1"]
    assert len(open_source(tmp_path, "image", source="arrow", path=f"a.{kind}")) == 2
    assert list(source.texts()) == ["a", "b", "c"]
    assert pickle.loads(pickle.dumps(source))[2] == examples[2]


def test_broken_rows_and_columns(datasets, tmp_path):
    table = {"image": [jpeg(), None, jpeg()], "caption": ["a", "b", None]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path, "pair", source="arrow", path="a.parquet")
    assert source[0].text == "a" and len(source) == 3
    for index, reason in ((1, "a.parquet:1: .* holds no picture"), (2, "a.parquet:2: .*not a null")):
        with pytest.raises(DataError, match=reason):
            source[index]
    with pytest.raises(DataError, match=r"no column 'captions' .*did you mean 'caption'"):
        open_source(tmp_path, "text", source="arrow", path="a.parquet", text_field="captions")


def test_paths_in_a_table_stay_inside(datasets, tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg())
    images = [{"bytes": None, "path": "1.jpg"}, {"bytes": None, "path": "../x.jpg"}]
    datasets.Dataset.from_dict({"image": images}).to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path, "image", source="arrow", path="a.parquet")
    assert source[0].image == jpeg()
    with pytest.raises(DataError, match="leads out of"):
        source[1]


def test_a_damaged_file_is_named(datasets, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"a.parquet can't be opened"):
        open_source(tmp_path, "image", source="arrow", path="a.parquet")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"reads .parquet or .arrow"):
        open_source(tmp_path, "image", source="arrow", path="a.csv")
