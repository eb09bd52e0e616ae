"""Arrow files that stay on the disk: memory-mapped, read row by row with pyarrow (extra `data`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.errors import DataError

FILE_MAGIC = b"ARROW1"
ROWS_AT_ONCE = 1000


class MappedTable:
    """One Arrow IPC file (the file format or the stream format). Each process maps it anew: no table is pickled."""

    def __init__(self, path: Path, name: str) -> None:
        """Map the file; `name` is how messages name it. Raises DataError if it is none or can't be read."""
        self.name = name
        self._path = path
        self._table = open_table(path, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._table.column_names)

    def kind(self, column: str) -> str:
        """Type of a column, as pyarrow writes it: binary, string, list<item: string>."""
        return str(self._table.schema.field(column).type)

    def value(self, column: str, row: int) -> Any:
        """One cell as plain Python values."""
        return self._table.column(column)[row].as_py()

    def lengths(self, column: str) -> NDArray[np.int64]:
        """(rows,): length of the list in each row; 1 where the list is empty or missing, or the column has no lists."""
        from pyarrow import compute

        if not self.kind(column).startswith(("list", "large_list")):
            return np.ones(len(self), dtype=np.int64)
        sizes = compute.list_value_length(self._table.column(column)).fill_null(1)
        lengths: NDArray[np.int64] = sizes.to_numpy().astype(np.int64)
        return lengths.clip(min=1)

    def values(self, column: str) -> Iterator[Any]:
        """All cells of a column, a thousand rows at a time in memory."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self._table.column(column).slice(start, ROWS_AT_ONCE).to_pylist()


def open_table(path: Path, name: str) -> Any:
    """The memory-mapped `pyarrow.Table` of an Arrow IPC file; DataError if it can't be read."""
    try:
        import pyarrow
        from pyarrow import ipc
    except ImportError as error:
        raise DataError(f"{name} needs the pyarrow package: pip install 'vlmoe[data]'") from error
    try:
        with path.open("rb") as file:
            is_file = file.read(len(FILE_MAGIC)) == FILE_MAGIC
        mapped = pyarrow.memory_map(str(path))
        return (ipc.open_file(mapped) if is_file else ipc.open_stream(mapped)).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: can't be opened as an Arrow table: {error}") from error
