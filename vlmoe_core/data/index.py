"""What is known of the files of a source without reading them again: where each record lies.

An index is a few columns of equal length, one row a record (a line, a sample of a tar, a pack of sentences). It is
built once for each file and kept under VLMOE_CACHE (default ~/.cache/vlmoe), because data folders may be read-only. The
key holds the file's path, size and time of change, and whatever else the index depends on.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.errors import DataError

Columns = dict[str, NDArray[Any]]
FORMAT = 1


@dataclass(frozen=True)
class Index:
    """The records of all files of a source, in order."""

    files: tuple[Path, ...]
    columns: Columns
    """One value a record, the files one after the other."""
    file: NDArray[np.int32]
    """Number of the file that a record lies in."""

    def __len__(self) -> int:
        return len(self.file)

    def path(self, record: int) -> Path:
        """The file of a record."""
        return self.files[int(self.file[record])]

    def first_of_file(self, record: int) -> int:
        """Number of the first record of the file that `record` lies in."""
        return int(np.searchsorted(self.file, self.file[record]))

    def blocks(self, counts: NDArray[np.int64]) -> list[int]:
        """Examples of each file, when record r makes counts[r] examples; files without any are left out."""
        sums = np.zeros(len(self.files), dtype=np.int64)
        np.add.at(sums, self.file, counts)
        return [int(size) for size in sums if size]


class Numbering:
    """Numbers the examples when record r makes counts[r] of them."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(record, number within the record) of an example; IndexError outside 0..len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        record = int(np.searchsorted(self._ends, index, side="right"))
        return record, index - int(self._ends[record - 1] if record else 0)


def load_index(
    files: Sequence[Path], kind: str, options: Sequence[str | int], build: Callable[[Path], Columns]
) -> Index:
    """The index of some files, from the cache where it is known.

    Args:
        files: what is indexed.
        kind: name of the sort of index, with its version: other sorts never meet.
        options: what the columns depend on beside the file (names of fields, a tokenizer's fingerprint, a length).
        build: makes the columns of one file.

    Raises:
        DataError: no file has a record, or the cache can't be written.
    """
    parts = [_load_file(path, kind, options, build) for path in files]
    lengths = [len(next(iter(part.values()))) for part in parts]
    if not sum(lengths):
        raise DataError(f"no examples: {', '.join(map(str, files[:3]))} {'and others ' * (len(files) > 3)}hold none")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Index(tuple(files), columns, np.repeat(np.arange(len(files), dtype=np.int32), lengths))


def columns_of(names: Sequence[str], rows: Iterable[Sequence[int]]) -> Columns:
    """Columns of whole numbers from rows, which may be a generator: no row outlives its turn."""
    table = np.fromiter(chain.from_iterable(rows), dtype=np.int64).reshape(-1, len(names))
    return {name: table[:, i] for i, name in enumerate(names)}


def cache_folder() -> Path:
    """VLMOE_CACHE, or ~/.cache/vlmoe."""
    return Path(os.environ.get("VLMOE_CACHE") or "~/.cache/vlmoe").expanduser()


def _load_file(path: Path, kind: str, options: Sequence[str | int], build: Callable[[Path], Columns]) -> Columns:
    stamp = _stamp(path)
    place = _place(path, stamp, kind, options)
    known = _read(place)
    if known is not None:
        return known
    try:
        columns = build(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
    if _stamp(path) != stamp:
        raise DataError(f"{path} changed while it was being indexed; wait until it is complete and start again")
    _write(place, columns)
    return columns


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _place(path: Path, stamp: tuple[int, int], kind: str, options: Sequence[str | int]) -> Path:
    key = json.dumps([FORMAT, str(path.resolve()), *stamp, kind, *options])
    return cache_folder() / "index" / kind / f"{path.stem[:80]}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def _read(place: Path) -> Columns | None:
    """The columns in a cache file; None where there is none or it is damaged, so that it is built again."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write(place: Path, columns: Columns) -> None:
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **columns)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(place)
    except OSError as error:
        raise DataError(
            f"the index can't be written to {place.parent}: {error.strerror}; set the environment variable VLMOE_CACHE "
            "to a folder that can be written"
        ) from error
