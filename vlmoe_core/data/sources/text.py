"""Plain text files and JSON lines, packed: each example is a run of whole sentences of one document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from vlmoe_core.data.example import Example, SourceContext, TextEncoder
from vlmoe_core.data.files import (
    FilesConfig,
    SliceReader,
    checked_text,
    decode_utf8,
    find_files,
    label,
    lines,
    parse_object,
    require_stream,
)
from vlmoe_core.data.index import Columns, Numbering, columns_of, load_index
from vlmoe_core.data.packing import Span, pack
from vlmoe_core.data.part import WHOLE, Part, part_of
from vlmoe_core.errors import DataError

SPECIAL_TOKENS = 2
"""[CLS] and [SEP]."""
COLUMNS = ("line", "start", "size", "first", "last")

JSON_LINES = ".jsonl"

Document = tuple[int, int, int]
"""Number of its first line, its first byte, its size in bytes (of JSON lines: of the whole line)."""


class Config(FilesConfig):
    """Plain text files, or JSON lines (names that end in .jsonl), packed by whole sentences."""

    document: Literal["line", "paragraph", "file"] = "line"
    """What a pack never crosses the end of; paragraphs have blank lines between them. JSON lines: always the line."""
    text_field: str = "text"
    """Field of a JSON line that holds the text."""
    part: Part = WHOLE
    """Share of each file's documents, from and to: (0, 0.9) and (0.9, 1) cut a file into training and held-out part."""


class TextSource:
    """The packs of text files. Without a text encoder only `texts` works, which is all that fitting one needs."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        require_stream("text", context.stream, "text")
        self._config = config
        self._root = context.root
        self._files = find_files(config.path, context.root)
        self._reader = SliceReader()
        self.blocks: list[int] = []
        if context.text_encoder is not None:
            self._open_index(context.text_encoder, context.max_text - SPECIAL_TOKENS)

    def _open_index(self, encoder: TextEncoder, limit: int) -> None:
        options = (self._config.document, self._config.text_field, str(self._config.part), encoder.fingerprint, limit)
        self._index = load_index(
            self._files, "text-1", options, lambda path: index_packs(path, self._config, encoder, limit)
        )
        counts = np.ones(len(self._index), dtype=np.int64)
        self._numbering = Numbering(counts)
        self.blocks = self._index.blocks(counts)

    def __len__(self) -> int:
        return sum(self.blocks)

    def __getitem__(self, index: int) -> Example:
        """The pack of that number; DataError, with file and line, if its document is broken."""
        record, _ = self._numbering.locate(index)
        path = self._index.path(record)
        line, start, size, first, last = (int(self._index.columns[name][record]) for name in COLUMNS)
        where = f"{label(path, self._root)}:{line}"
        text = document_text(self._reader.read(path, start, size, where), path, self._config, where)
        return Example(where, text=text[first:last])

    def texts(self) -> Iterator[str]:
        """Every document, in stored order; broken ones are left out."""
        for path in self._files:
            for line, start, size in documents(path, self._config):
                where = f"{label(path, self._root)}:{line}"
                try:
                    yield document_text(self._reader.read(path, start, size, where), path, self._config, where)
                except DataError:
                    continue


def documents(path: Path, config: Config) -> Iterator[Document]:
    """The documents of a file that are not blank, as far as they are in the config's part of it."""
    found = _all_documents(path, config.document)
    if config.part == WHOLE:
        return found
    held = list(found)
    return iter(held[part_of(len(held), config.part)])


def _all_documents(path: Path, kind: Literal["line", "paragraph", "file"]) -> Iterator[Document]:
    found: Iterator[tuple[int, int, int]] = (
        (line, start, start + len(content)) for line, start, content in lines(path)
    )
    if kind != "line" and path.suffix != JSON_LINES:
        found = _joined(found, whole=kind == "file")
    yield from ((line, start, end - start) for line, start, end in found)


def _joined(found: Iterator[tuple[int, int, int]], whole: bool) -> Iterator[tuple[int, int, int]]:
    """(first line, start, end) of the whole file, or of each run of lines without a blank one between."""
    first_line = last_line = start = end = 0
    for line, line_start, line_end in found:
        if last_line and not whole and line != last_line + 1:
            yield first_line, start, end
            last_line = 0
        if not last_line:
            first_line, start = line, line_start
        last_line, end = line, line_end
    if last_line:
        yield first_line, start, end


def document_text(content: bytes, path: Path, config: Config, where: str) -> str:
    """Text of a document, or of a part of a plain one; DataError, beginning with `where`, if it is broken."""
    if path.suffix != JSON_LINES:
        return decode_utf8(content, where)
    fields = parse_object(content, where)
    if config.text_field not in fields:
        raise DataError(f"{where}: has no field '{config.text_field}' (text_field); its fields: {', '.join(fields)}")
    return checked_text(fields[config.text_field], config.text_field, where)


def index_packs(path: Path, config: Config, encoder: TextEncoder, limit: int) -> Columns:
    """Columns line, start, size (bytes) and first, last (characters in what those bytes hold), one row a pack.

    A broken document is one row, which raises when it is read.
    """
    return columns_of(COLUMNS, _rows(path, config, encoder, limit))


def _rows(path: Path, config: Config, encoder: TextEncoder, limit: int) -> Iterator[tuple[int, ...]]:
    reader = SliceReader()
    for line, start, size in documents(path, config):
        try:
            text = document_text(reader.read(path, start, size, str(path)), path, config, "")
        except DataError:
            yield line, start, size, 0, 0
            continue
        packs = pack(text, limit, lambda piece: len(encoder.encode(piece)))
        if path.suffix == JSON_LINES:
            yield from ((line, start, size, first, last) for first, last in packs)
        else:
            yield from ((line, *place) for place in _in_bytes(text, start, packs))


def _in_bytes(text: str, start: int, packs: list[Span]) -> Iterator[tuple[int, int, int, int]]:
    """(first byte, bytes, 0, characters) of each pack of a plain text, so that no more than the pack is read."""
    done = 0
    for first, last in packs:
        start += len(text[done:first].encode())
        size = len(text[first:last].encode())
        yield start, size, 0, last - first
        start, done = start + size, last


def open_source(config: Config, context: SourceContext) -> TextSource:
    """The files that `config.path` names."""
    return TextSource(config, context)
