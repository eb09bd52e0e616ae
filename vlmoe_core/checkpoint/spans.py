"""Tensors as bytes in safetensors files: found, moved and compared without their being read as numbers."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vlmoe_core.checkpoint.manifest import HEADER_LENGTH

CHUNK = 2**23
"""Bytes in memory at a time."""
ALIGNED = 8
"""Where the values begin is a multiple of this."""


@dataclass(frozen=True)
class Span:
    """Where the bytes of a tensor lie, and what they are."""

    path: Path
    """The file."""
    start: int
    """The first byte, from the beginning of the file."""
    nbytes: int
    """How many."""
    dtype: str
    """As safetensors writes it: F32, BF16."""
    shape: tuple[int, ...]
    """Sizes of the dimensions."""

    @property
    def width(self) -> int:
        """Bytes of a value; 0 where there are none."""
        return self.nbytes // max(1, prod(self.shape))

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for at in range(0, self.nbytes, CHUNK):
                yield file.read(min(CHUNK, self.nbytes - at))


def spans_in(path: Path) -> dict[str, Span]:
    """The tensors of a safetensors file, the header of which was found right."""
    with path.open("rb") as file:
        (length,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
        header: dict[str, Any] = json.loads(file.read(length))
    first = HEADER_LENGTH.size + length
    return {
        key: Span(path, first + entry["data_offsets"][0], _length(entry), entry["dtype"], tuple(entry["shape"]))
        for key, entry in header.items()
        if key != "__metadata__"
    }


def write_spans(path: Path, spans: Mapping[str, Span]) -> None:
    """Write a safetensors file of tensors that lie in other files; wide numbers first, as the library does."""
    ordered = dict(sorted(spans.items(), key=lambda item: (-item[1].width, item[0])))
    with path.open("xb") as file:
        file.write(_header(ordered))
        for span in ordered.values():
            for chunk in span.chunks():
                file.write(chunk)


def same(left: Span, right: Span) -> bool:
    """Whether two tensors are of one type and shape, and the same bit for bit."""
    alike = (left.dtype, left.shape, left.nbytes) == (right.dtype, right.shape, right.nbytes)
    return alike and all(one == other for one, other in zip(left.chunks(), right.chunks(), strict=True))


def _header(spans: Mapping[str, Span]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, span in spans.items():
        entries[key] = {"dtype": span.dtype, "shape": span.shape, "data_offsets": [at, at + span.nbytes]}
        at += span.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    return HEADER_LENGTH.pack(len(text)) + text


def _length(entry: Mapping[str, Any]) -> int:
    first, end = entry["data_offsets"]
    return int(end - first)
