"""Karpathy's splits as published: dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json.

One JSON document: `{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}`. Files about one folder of
pictures have no `filepath`. (A. Karpathy, L. Fei-Fei, CVPR 2015.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

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
from vlmoe_core.data.index import Columns, Numbering, columns_of, load_index
from vlmoe_core.data.json_lists import ListItem, list_items
from vlmoe_core.errors import DataError

Split = Literal["train", "restval", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Config(FilesConfig):
    """Karpathy's JSON, such as dataset_coco.json."""

    images: str
    """Folder of the pictures, relative to `data.root`; a picture lies at images/filepath/filename."""
    split: tuple[Split, ...]
    """One split or a list of them. Retrieval on COCO trains on [train, restval] (microsoft/unilm beit3)."""

    @field_validator("split", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        listed = (value,) if isinstance(value, str) else value
        if not listed:
            raise ValueError(f"names no split; known: {', '.join(SPLITS)}")
        return listed


class KarpathySource:
    """A picture of the splits is one example of `image`, each of its captions one of `pair` and of `text`."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._stream = context.stream
        self._root = context.root
        self._folder = absolute(config.images, context.root)
        files = find_files(config.path, context.root)
        self._index = load_index(files, "karpathy-1", (), lambda path: index_images(path, label(path, context.root)))
        columns = self._index.columns
        _require_splits(config.split, columns["split"], label(files[0], context.root))
        asked = np.isin(columns["split"], [SPLITS.index(split) for split in config.split])
        counts = asked.astype(np.int64) * (1 if context.stream == "image" else columns["texts"])
        self._numbering = Numbering(counts)
        self.blocks = self._index.blocks(counts)
        self._reader = SliceReader()

    def __len__(self) -> int:
        return len(self._numbering)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with file and entry, if it is broken."""
        example, fields = self._described(index)
        if self._stream == "text":
            return replace(example, image_id=-1)
        name, folder = fields.get("filename"), fields.get("filepath", "")
        if not isinstance(name, str) or not name or not isinstance(folder, str):
            raise DataError(f"{example.name}: 'filename' must name a picture, and 'filepath', if any, its folder")
        path = inside(str(PurePosixPath(folder, name)), self._folder, example.name)
        return replace(example, image=read_file(path, example.name))

    def texts(self) -> Iterator[str]:
        """Every caption of the splits, in stored order; broken ones are left out. The image stream has none."""
        return (example.text for example in self.records() if example.text)

    def records(self) -> Iterator[Example]:
        """Every example once, in stored order, without its picture; broken ones are left out."""
        return sound_examples(lambda index: self._described(index)[0], len(self))

    def _described(self, index: int) -> tuple[Example, Mapping[str, Any]]:
        """The example without its picture, and the entry of the picture."""
        record, nth = self._numbering.locate(index)
        path, first = self._index.path(record), self._index.first_of_file(record)
        where = f"{label(path, self._root)}:images[{record - first}]"
        start, size = (int(self._index.columns[name][record]) for name in ("start", "size"))
        fields = parse_object(self._reader.read(path, start, size, where), where)
        if self._stream == "image":
            return Example(where, image_id=record), fields
        sentences = fields["sentences"]
        raw = sentences[nth].get("raw") if sentences and isinstance(sentences[nth], dict) else None
        return Example(where, text=checked_text(raw, "raw", where), image_id=record), fields


def _require_splits(asked: tuple[Split, ...], held: NDArray[np.int64], where: str) -> None:
    """DataError if one of the asked splits has no picture."""
    known = [split for number, split in enumerate(SPLITS) if number in held]
    for split in asked:
        if split not in known:
            raise DataError(f"{where}: has no pictures of split '{split}'; it has {', '.join(known)}")


def index_images(path: Path, where: str) -> Columns:
    """Columns start, size (bytes), split (its number in SPLITS) and texts (captions), one row a picture.

    Raises DataError, beginning with `where` (the file), if it is broken or a picture has no known split or no list of
    sentences. An empty list counts as one caption, which raises.
    """
    return columns_of(
        ("start", "size", "split", "texts"), (_row(item, where) for item in list_items(path, "images", where))
    )


def _row(item: ListItem, where: str) -> tuple[int, ...]:
    place = f"{where}:images[{item.number - 1}]"
    split, sentences = item.fields.get("split"), item.fields.get("sentences")
    if split not in SPLITS:
        raise DataError(f"{place}: 'split' must be one of {', '.join(SPLITS)}, not {split!r}")
    if not isinstance(sentences, list):
        raise DataError(f"{place}: has no list 'sentences'; its fields: {', '.join(item.fields)}")
    return item.start, item.size, SPLITS.index(split), max(1, len(sentences))


def open_source(config: Config, context: SourceContext) -> KarpathySource:
    """The pictures of the asked splits in the files that `config.path` names."""
    return KarpathySource(config, context)
