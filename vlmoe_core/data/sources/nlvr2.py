"""Is a statement true of two photographs (NLVR2), or of three drawn boxes (NLVR)? The JSON lines as published.

NLVR2: Suhr et al. 2019, "A Corpus for Reasoning about Natural Language Grounded in Photographs". NLVR: Suhr et al.
2017, "A Corpus of Natural Language for Visual Reasoning".
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import (
    FilesConfig,
    SliceReader,
    absolute,
    checked_text,
    find_files,
    inside,
    label,
    lines,
    parse_object,
    read_file,
    require_stream,
    sound_examples,
)
from vlmoe_core.data.index import Columns, columns_of, load_index
from vlmoe_core.errors import DataError

COLUMNS = ("line", "start", "size", "pair")
LABELS = {"True": "True", "False": "False", "true": "True", "false": "False"}
"""NLVR2 writes them as Python does, NLVR as JSON does."""
BOX_SIZE = 100
BOX_LEFTS = (0, 150, 300)
"""NLVR: width and height of a box, and where the boxes begin, in pixels."""
PICTURE_SIZE = (400, 100)

Layout = Literal["nlvr2", "nlvr"]


class Config(FilesConfig):
    """The JSON lines of NLVR2 or NLVR, and their pictures."""

    images: str | None = None
    """Folder of the pictures, relative to `data.root`; null: the folder of the JSON lines file.

    nlvr2: the folder that holds `images/train`, `dev`, `test1`; nlvr: the one that holds `images`.
    """
    layout: Layout = "nlvr2"
    """nlvr2: two photographs, each a file; nlvr: one drawing of three boxes, which become three pictures."""


class Nlvr2Source:
    """One example a statement."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        require_stream("nlvr2", context.stream, "pair")
        self._config = config
        self._root = context.root
        files = find_files(config.path, context.root)
        self._index = load_index(files, "nlvr2-1", (config.layout,), lambda path: index_statements(path, config.layout))
        self.blocks = self._index.blocks(np.ones(len(self._index), dtype=np.int64))
        self._reader = SliceReader()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        """The statement of that number; DataError, with file and line, if it is broken."""
        example, names = self._described(index)
        config, where = self._config, example.name
        folder = self._index.path(index).parent if config.images is None else absolute(config.images, self._root)
        data = [read_file(inside(name, folder, where), where) for name in names]
        pictures = tuple(data) if config.layout == "nlvr2" else boxes(data[0], f"{where}: {names[0]}")
        return replace(example, image=pictures[0], more_images=pictures[1:])

    def texts(self) -> Iterator[str]:
        """Every statement, in stored order; broken ones are left out."""
        return (example.text for example in self.records() if example.text)

    def records(self) -> Iterator[Example]:
        """Every statement once, without its pictures; broken ones are left out."""
        return sound_examples(lambda index: self._described(index)[0], len(self))

    def _described(self, index: int) -> tuple[Example, tuple[str, ...]]:
        """The example of that number, less its pictures, and their names."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        path = self._index.path(index)
        line, start, size, pair = (int(self._index.columns[name][index]) for name in COLUMNS)
        where = f"{label(path, self._root)}:{line}"
        fields = parse_object(self._reader.read(path, start, size, where), where)
        names = picture_names(fields, path, self._config.layout, where)
        text = checked_text(required(fields, "sentence", where), "sentence", where)
        image_id = self._index.first_of_file(index) + pair
        return Example(where, text=text, image_id=image_id, facts=statement_facts(fields, where)), names


def index_statements(path: Path, layout: Layout) -> Columns:
    """Columns line, start, size (bytes) and pair: the number, in the file, of the first record of the same pictures.

    A line that can't be read is a record of its own, which raises.
    """
    return columns_of(COLUMNS, _rows(path, layout))


def _rows(path: Path, layout: Layout) -> Iterator[tuple[int, ...]]:
    first_with: dict[tuple[str, ...], int] = {}
    for record, (line, start, content) in enumerate(lines(path)):
        try:
            pair = first_with.setdefault(picture_names(parse_object(content, ""), path, layout, ""), record)
        except DataError:
            pair = record
        yield line, start, len(content), pair


def picture_names(fields: Mapping[str, Any], file: Path, layout: Layout, where: str) -> tuple[str, ...]:
    """Paths of a statement's pictures; DataError, beginning with `where`, if its fields don't tell them.

    The official names. nlvr2: of statement `dev-850-0-1` they are `dev/dev-850-0-img0.png` and `-img1.png`; only train
    has folders, `images/train/<directory>/`. nlvr: what the field `image` names (no official field), or
    `images/<directory>/<split>-<identifier>-0.png`, where the split is the name of the JSON file and 0 the order of the
    boxes that is described.
    """
    identifier = str(required(fields, "identifier", where))
    if layout == "nlvr":
        if "image" in fields:
            return (str(fields["image"]),)
        directory = required(fields, "directory", where)
        return (f"images/{directory}/{file.stem}-{identifier}-0.png",)
    stem, _, number = identifier.rpartition("-")
    if not stem or not number.isdecimal():
        raise DataError(f"{where}: the identifier '{identifier}' is not like dev-850-0-1 (is this `layout: nlvr`?)")
    split = stem.partition("-")[0]
    folder = f"images/{split}/{fields['directory']}" if "directory" in fields else split
    return tuple(f"{folder}/{stem}-img{side}.png" for side in (0, 1))


def required(fields: Mapping[str, Any], name: str, where: str) -> Any:
    """The field of that name; DataError, beginning with `where`, if it is missing."""
    if name not in fields:
        raise DataError(f"{where}: has no field '{name}'; its fields: {', '.join(fields) or 'none'}")
    return fields[name]


def statement_facts(fields: Mapping[str, Any], where: str) -> dict[str, str]:
    """`id`, and `label` where the file tells it; DataError, beginning with `where`, for any other label."""
    facts = {"id": str(fields["identifier"])}
    if "label" in fields:
        given = fields["label"]
        if not isinstance(given, str) or given not in LABELS:
            raise DataError(f"{where}: the label must be 'True' or 'False', as a string, not {given!r}")
        facts["label"] = LABELS[given]
    return facts


def boxes(data: bytes, where: str) -> tuple[Image.Image, ...]:
    """The three boxes of a drawing of NLVR, 100 x 100 pixels each.

    Raises DataError, beginning with `where`, if the bytes are no PNG of 400 x 100 pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.size == PICTURE_SIZE:
                return tuple(picture.crop((left, 0, left + BOX_SIZE, BOX_SIZE)) for left in BOX_LEFTS)
            width, height = picture.size
    except Exception as error:
        # On damaged files Pillow raises OSError, SyntaxError, ValueError and struct.error.
        raise DataError(f"{where}: can't be decoded: {error}") from error
    raise DataError(f"{where}: has {width} x {height} pixels; a drawing of three boxes (layout: nlvr) has 400 x 100")


def open_source(config: Config, context: SourceContext) -> Nlvr2Source:
    """The JSON lines files that `config.path` names."""
    return Nlvr2Source(config, context)
