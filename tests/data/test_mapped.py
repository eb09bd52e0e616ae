import builtins

import numpy as np
import pytest

from vlmoe_core.data.mapped import ROWS_AT_ONCE, MappedTable
from vlmoe_core.errors import DataError

pyarrow = pytest.importorskip("pyarrow", reason="the datasets package (extra data) is absent")


def write(path, batches):
    batches = [pyarrow.RecordBatch.from_pydict(batch) for batch in batches]
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return MappedTable(path, "a table")


def test_cells_of_all_batches(tmp_path):
    table = write(tmp_path / "a.arrow", [{"n": [1, 2], "t": [["a"], ["b", "c"]]}, {"n": [3], "t": [[""]]}])
    assert len(table) == 3 and table.columns == ["n", "t"]
    assert [table.value("n", row) for row in range(3)] == [1, 2, 3]
    assert list(table.values("t")) == [["a"], ["b", "c"], [""]]
    np.testing.assert_array_equal(table.lengths("t"), [1, 2, 1])
    np.testing.assert_array_equal(table.lengths("n"), [1, 1, 1])


def test_long_columns(tmp_path):
    numbers = list(range(2 * ROWS_AT_ONCE + 5))
    assert list(write(tmp_path / "a.arrow", [{"n": numbers}]).values("n")) == numbers


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name == "pyarrow":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"^a table needs the pyarrow package: pip install 'vlmoe\[data\]'"):
        MappedTable(tmp_path / "a.arrow", "a table")
