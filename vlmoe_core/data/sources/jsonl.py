"""JSON lines with pictures and captions: `{"image": "photos/1.jpg", "caption": "a dog"}`, one object a line.

A caption field may hold a list: n captions of a picture. Lines that name the same picture are captions of one picture
too: the image stream has it once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import (
    FilesConfig,
    SliceReader,
    absolute,
    checked_text,
    count_texts,
    find_files,
    inside,
    label,
    lines,
    parse_object,
    read_file,
    sound_examples,
    text_values,
    usable_texts,
)
from vlmoe_core.data.index import Columns, Numbering, columns_of, load_index
from vlmoe_core.errors import DataError


class Config(FilesConfig):
    """JSON lines: one object a line, with the name of a picture, captions, or both."""

    image_field: str = "image"
    """Field that names the picture, a path relative to `image_root`."""
    text_field: str = "caption"
    """Field that holds the caption, or a list of captions."""
    image_root: str | None = None
    """Folder of the pictures, relative to `data.root`; null: the folder of the JSON lines file."""


class JsonlSource:
    """The examples of JSON lines files."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._config = config
        self._stream = context.stream
        self._root = context.root
        files = find_files(config.path, context.root)
        self._index = load_index(
            files, "jsonl-1", (config.image_field, config.text_field), lambda path: index_lines(path, config)
        )
        columns = self._index.columns
        counts = columns["first"] if context.stream == "image" else columns["texts"]
        self._numbering = Numbering(counts)
        self.blocks = self._index.blocks(counts)
        self._reader = SliceReader()

    def __len__(self) -> int:
        return len(self._numbering)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with file and line, if it is broken."""
        example, fields = self._described(index)
        if self._stream == "text":
            return example
        record, _ = self._numbering.locate(index)
        return replace(example, image=self._picture(fields, self._index.path(record), example.name))

    def texts(self) -> Iterator[str]:
        """Every caption, in stored order; broken ones are left out."""
        for record in range(len(self._index)):
            where = self._where(record)
            try:
                values = text_values(self._fields(record, where), self._config.text_field, where)
            except DataError:
                continue
            yield from usable_texts(values)

    def records(self) -> Iterator[Example]:
        """Every example once, without its picture; broken ones are left out."""
        return sound_examples(lambda index: self._described(index)[0], len(self))

    def _described(self, index: int) -> tuple[Example, Mapping[str, Any]]:
        """The example of that number, less its picture, and the fields of its line."""
        record, nth = self._numbering.locate(index)
        where = self._where(record)
        fields = self._fields(record, where)
        text = None
        if self._stream != "image":
            text = checked_text(
                text_values(fields, self._config.text_field, where)[nth], self._config.text_field, where
            )
        if self._stream == "text":
            return Example(where, text=text), fields
        image_id = self._index.first_of_file(record) + int(self._index.columns["picture"][record])
        return Example(where, text=text, image_id=image_id), fields

    def _where(self, record: int) -> str:
        return f"{label(self._index.path(record), self._root)}:{self._index.columns['line'][record]}"

    def _fields(self, record: int, where: str) -> Mapping[str, Any]:
        start, size = (int(self._index.columns[name][record]) for name in ("start", "size"))
        return parse_object(self._reader.read(self._index.path(record), start, size, where), where)

    def _picture(self, fields: Mapping[str, Any], file: Path, where: str) -> bytes:
        name = fields.get(self._config.image_field)
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: '{self._config.image_field}' (image_field) must name a picture, not {name!r}")
        folder = file.parent if self._config.image_root is None else absolute(self._config.image_root, self._root)
        return read_file(inside(name, folder, where), where)


def index_lines(path: Path, config: Config) -> Columns:
    """Columns line, start, size (bytes), texts (captions of the line), picture, first.

    `picture` is the number, in the file, of the first record that names the same picture; `first` says whether that is
    this one. A line that can't be read is a record of its own with one example, which raises.
    """
    return columns_of(("line", "start", "size", "texts", "picture", "first"), _rows(path, config))


def _rows(path: Path, config: Config) -> Iterator[tuple[int, ...]]:
    first_with: dict[str, int] = {}
    for record, (line, start, content) in enumerate(lines(path)):
        name = _picture_name(content, config.image_field)
        picture = record if name is None else first_with.setdefault(name, record)
        yield line, start, len(content), count_texts(content, config.text_field), picture, picture == record


def _picture_name(content: bytes, field: str) -> str | None:
    try:
        name = parse_object(content, "").get(field)
    except DataError:
        return None
    return name if isinstance(name, str) else None


def open_source(config: Config, context: SourceContext) -> JsonlSource:
    """The JSON lines files that `config.path` names."""
    return JsonlSource(config, context)
