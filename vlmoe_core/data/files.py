"""What the file sources share: finding files, reading slices of them, and JSON lines."""

import glob
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from pydantic import field_validator

from vlmoe_core.data.config import SourceConfig, StreamName
from vlmoe_core.data.example import Example
from vlmoe_core.errors import DataError

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2"))
"""Endings, in lower case, of the files that count as pictures."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_OPEN_FILES = 64


class FilesConfig(SourceConfig):
    """A source that reads files."""

    path: tuple[str, ...]
    """One file or a list of files, relative to `data.root`; `*`, `?`, `[...]` and `**` match as in a shell."""

    @field_validator("path", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return as_list(value)


def as_list(value: Any) -> Any:
    """What a field for one file or several was given, as a list; ValueError if it names no file."""
    listed = (value,) if isinstance(value, str) else value
    if isinstance(listed, Sequence) and not listed:
        raise ValueError("names no file")
    return listed


def require_stream(source: str, stream: StreamName, wanted: StreamName) -> None:
    """DataError unless the stream that is asked for is the only one that the source has examples for."""
    if stream != wanted:
        article = "an" if source[0] in "aeiou" else "a"
        raise DataError(f"{article} {source} source has no examples for the {stream} stream; name it under '{wanted}'")


def find_files(patterns: Sequence[str], root: Path) -> tuple[Path, ...]:
    """The files that the patterns name, each once: in the order of the patterns, sorted within one.

    Raises DataError for a pattern that matches nothing, and for a folder.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        place = absolute(pattern, root)
        matches = [place] if place.exists() else _matching(pattern, root)
        if not matches:
            raise nothing_at(pattern, place)
        found.update(dict.fromkeys(path for path in matches if path.is_file()))
        if all(path.is_dir() for path in matches):
            raise DataError(f"'{pattern}' is a folder ({place}), not a file; name its files, as in '{pattern}/*'")
    return tuple(found)


def _matching(pattern: str, root: Path) -> list[Path]:
    # `root` stands apart from the pattern: its own name may hold brackets. Path.glob would refuse absolute patterns.
    names = glob.glob(str(Path(pattern).expanduser()), root_dir=root, recursive=True)  # noqa: PTH207
    return [absolute(name, root) for name in sorted(names)]


def absolute(path: str | Path, root: Path) -> Path:
    """The absolute form of a path that is relative to `root`; links stay as they are."""
    return Path(os.path.abspath(root / Path(path).expanduser()))  # noqa: PTH100


def nothing_at(pattern: str, place: Path) -> DataError:
    """The error for a path that names nothing."""
    return DataError(
        f"nothing matches '{pattern}' (looked for {place}); correct the path, or name the folder that holds it with "
        "--set data.root=FOLDER"
    )


def label(path: Path, root: Path) -> str:
    """How messages name a file: relative to `root` where it lies below, else in full."""
    start = absolute(root, Path())
    return path.relative_to(start).as_posix() if path.is_relative_to(start) else str(path)


def inside(name: str, folder: Path, where: str) -> Path:
    """The file `name` of a folder; DataError if the name is absolute or climbs out with `..`.

    The check reads the name alone: links that a user keeps in the folder are followed.
    """
    if is_unsafe(name):
        raise DataError(f"{where}: '{name}' leads out of {folder}; name pictures relative to that folder")
    return folder / name


def is_unsafe(name: str) -> bool:
    """Whether a relative name of a file is absolute, holds a NUL, or could climb with `..`."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


def read_file(path: Path, where: str) -> bytes:
    """All bytes of a regular file; DataError, beginning with `where`, if it can't be read."""
    try:
        if not path.is_file():
            raise DataError(f"{where}: there is no file {path}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: {path} can't be read: {error.strerror}") from error


class SliceReader:
    """Reads byte ranges of many files. Each process opens them anew: no handle travels in a pickle."""

    def __init__(self) -> None:
        self._handles: OrderedDict[Path, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": OrderedDict()}

    def __del__(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def read(self, path: Path, start: int, size: int, where: str) -> bytes:
        """`size` bytes from byte `start`; DataError, beginning with `where`, if the file doesn't have them."""
        try:
            data = os.pread(self._handle(path), size, start)
        except OSError as error:
            raise DataError(f"{where}: {path} can't be read: {error.strerror}") from error
        if len(data) < size:
            raise DataError(f"{where}: {path} ends before byte {start + size}; was it cut since it was indexed?")
        return data

    def _handle(self, path: Path) -> int:
        if path not in self._handles:
            if len(self._handles) >= MAX_OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[path] = os.open(path, os.O_RDONLY)
        self._handles.move_to_end(path)
        return self._handles[path]


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, first byte, content) of each line that is not blank, without its end and byte order mark."""
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            skipped = len(BYTE_ORDER_MARK) if number == 1 and raw.startswith(BYTE_ORDER_MARK) else 0
            content = raw[skipped:].rstrip(b"\r\n")
            if content.strip():
                yield number, start + skipped, content
            start += len(raw)


def decode_utf8(data: bytes, where: str) -> str:
    """Text of UTF-8 bytes; DataError, beginning with `where`, if they are none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not valid UTF-8 (byte {error.start} of it: 0x{data[error.start]:02x})") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in some bytes; DataError, beginning with `where`, if they hold none.

    NaN and Infinity, which JSON doesn't know, are refused.
    """
    try:
        value = json.loads(decode_utf8(data, where), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is no JSON object {{...}} but a {_kind(value)}")
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def text_values(record: Mapping[str, Any], field: str, where: str) -> list[Any]:
    """The texts in a field that holds a string or a list, not yet checked one by one; DataError if it holds neither."""
    if field not in record:
        raise DataError(f"{where}: has no field '{field}' (text_field); its fields: {', '.join(record) or 'none'}")
    value = record[field]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise DataError(f"{where}: '{field}' must be a string or a list of strings, not a {_kind(value)}")
    if not value:
        raise DataError(f"{where}: '{field}' is an empty list")
    return value


def count_texts(data: bytes, field: str) -> int:
    """How many texts the JSON object in `data` holds; 1 where that can't be told: one example that raises."""
    try:
        return len(text_values(parse_object(data, ""), field, ""))
    except DataError:
        return 1


def checked_text(value: Any, field: str, where: str) -> str:
    """A text that can be learned from; DataError, beginning with `where`, if it is none, blank or no Unicode."""
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must hold strings, not a {_kind(value)}")
    if not value.strip():
        raise DataError(f"{where}: '{field}' is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: '{field}' holds half a surrogate pair, which is no Unicode text") from error
    return value


def usable_texts(values: Iterable[Any]) -> Iterator[str]:
    """Those of the values that `checked_text` accepts."""
    for value in values:
        try:
            yield checked_text(value, "", "")
        except DataError:
            continue


def sound_examples(describe: Callable[[int], Example], count: int) -> Iterator[Example]:
    """What `describe` makes of 0..count - 1, less those for which it raises DataError."""
    for index in range(count):
        try:
            yield describe(index)
        except DataError:
            continue
