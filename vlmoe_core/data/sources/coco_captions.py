"""COCO captions as published (X. Chen et al., arXiv 1504.00325), and files made like them.

One JSON document: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import (
    FilesConfig,
    SliceReader,
    absolute,
    checked_text,
    find_files,
    inside,
    label,
    parse_object,
    read_file,
    sound_examples,
)
from vlmoe_core.data.index import Columns, columns_of, load_index
from vlmoe_core.data.json_lists import list_items
from vlmoe_core.errors import DataError

NO_PICTURE = -1
IDS = {"images": "id", "annotations": "image_id"}
"""Name of a list: the field of its objects that holds the id of a picture."""


class Config(FilesConfig):
    """COCO captions JSON, such as captions_train2017.json."""

    images: str
    """Folder of the pictures that the files name, relative to `data.root`."""


class CocoCaptionsSource:
    """A picture is one example of `image`, each of its captions one of `pair` and of `text`, in the file's order."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._stream = context.stream
        self._folder = absolute(config.images, context.root)
        files = find_files(config.path, context.root)
        self._images = ListRecords("images", files, context.root)
        self._captions: ListRecords | None = None
        self._image_of = np.arange(len(self._images))
        if context.stream != "image":
            self._captions = ListRecords("annotations", files, context.root)
            self._image_of = match(self._images, self._captions)
        self.blocks = (self._captions or self._images).blocks

    def __len__(self) -> int:
        return len(self._image_of)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with file and entry, if it is broken."""
        example = self._described(index)
        if self._stream == "text":
            return replace(example, image_id=-1)
        place, fields = self._images.read(example.image_id)
        name = fields.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError(f"{place}: 'file_name' must name a picture, not {name!r}")
        return replace(example, image=read_file(inside(name, self._folder, example.name), example.name))

    def texts(self) -> Iterator[str]:
        """Every caption, in stored order; broken ones are left out. The image stream has none."""
        return (example.text for example in self.records() if example.text)

    def records(self) -> Iterator[Example]:
        """Every example once, in stored order, without its picture; broken ones are left out."""
        return sound_examples(self._described, len(self))

    def _described(self, index: int) -> Example:
        """The example without its picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        image = int(self._image_of[index])
        if self._captions is None:
            return Example(self._images.where(index), image_id=image)
        where, fields = self._captions.read(index)
        if image == NO_PICTURE:
            raise DataError(f"{where}: its image_id {fields.get('image_id')} is not among the images of this file")
        return Example(where, text=checked_text(fields.get("caption"), "caption", where), image_id=image)


class ListRecords:
    """The objects of one list, `images` or `annotations`, of all files. Only places and ids are in memory."""

    def __init__(self, name: str, files: tuple[Path, ...], root: Path) -> None:
        self._name = name
        self._root = root
        self._index = load_index(files, "coco-captions-1", (name,), lambda path: index_list(path, name, root))
        self._reader = SliceReader()
        self.ids: NDArray[np.int64] = self._index.columns["id"]
        """Id of each record's picture."""
        self.file: NDArray[np.int32] = self._index.file
        """Number of the file that each record lies in."""
        self.blocks = self._index.blocks(np.ones(len(self._index), dtype=np.int64))
        """Records of each file."""

    def __len__(self) -> int:
        return len(self._index)

    def where(self, record: int) -> str:
        """How messages name a record: `captions_val2017.json:annotations[5]`."""
        path, first = self._index.path(record), self._index.first_of_file(record)
        return f"{label(path, self._root)}:{self._name}[{record - first}]"

    def read(self, record: int) -> tuple[str, Mapping[str, Any]]:
        """How messages name a record, and its content."""
        where = self.where(record)
        start, size = (int(self._index.columns[name][record]) for name in ("start", "size"))
        return where, parse_object(self._reader.read(self._index.path(record), start, size, where), where)


def index_list(path: Path, name: str, root: Path) -> Columns:
    """Columns start, size (bytes) and id (of the picture), one row an object of the list `name`.

    Raises DataError, beginning with the file, if it is broken, an object has no such id, or two pictures have the same.
    """
    where = label(path, root)
    columns = columns_of(("start", "size", "id"), _rows(path, name, where))
    ids, counts = np.unique(columns["id"], return_counts=True)
    if name == "images" and len(ids) < len(columns["id"]):
        raise DataError(f"{where}: the id {ids[counts > 1][0]} stands in 'images' more than once")
    return columns


def _rows(path: Path, name: str, where: str) -> Iterator[tuple[int, ...]]:
    for item in list_items(path, name, where):
        value = item.fields.get(IDS[name])
        if type(value) is not int or not 0 <= value < 2**63:
            raise DataError(f"{where}:{name}[{item.number - 1}]: '{IDS[name]}' must be a whole number, not {value!r}")
        yield item.start, item.size, value


def match(images: ListRecords, captions: ListRecords) -> NDArray[np.int64]:
    """(captions,): number of each caption's picture, which is in the same file; NO_PICTURE where that file has none."""
    found = np.full(len(captions), NO_PICTURE, dtype=np.int64)
    for file in np.unique(images.file):
        here, wanted = np.flatnonzero(images.file == file), np.flatnonzero(captions.file == file)
        sorted_here = here[np.argsort(images.ids[here])]
        places = np.searchsorted(images.ids[sorted_here], captions.ids[wanted]).clip(max=len(here) - 1)
        candidates = sorted_here[places]
        found[wanted] = np.where(images.ids[candidates] == captions.ids[wanted], candidates, NO_PICTURE)
    return found


def open_source(config: Config, context: SourceContext) -> CocoCaptionsSource:
    """The captions files that `config.path` names."""
    return CocoCaptionsSource(config, context)
