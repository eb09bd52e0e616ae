"""A folder of pictures; the folders in it are classes, and NAME.txt beside NAME.jpg is its caption.

ImageNet (ILSVRC 2012) as published: `train` with `classes` (a synset list), and `val` with `classes` and `labels`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vlmoe_core.data.class_files import checked_class, class_list, picture_labels
from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import (
    IMAGE_SUFFIXES,
    absolute,
    checked_text,
    decode_utf8,
    label,
    nothing_at,
    read_file,
    sound_examples,
)
from vlmoe_core.errors import DataError


class Config(SourceConfig):
    """A folder of pictures, with the folders in it as classes."""

    path: str
    """The folder, relative to `data.root`."""
    recursive: bool = True
    """Read the folders inside as well; links to folders are not followed."""
    classes: str | None = None
    """Text file, relative to `data.root`: the first word of each line is a class (ImageNet's synset list).

    Another class than these is an error. null: every folder is a class.
    """
    labels: str | None = None
    """Text file, relative to `data.root`, with the class of each picture in place of the folders; null: the folders.

    A line is `NAME CLASS`; or a number from 1, the place of the class in `classes`, the n-th for the n-th of the sorted
    pictures (ILSVRC2012_validation_ground_truth.txt, which counts in the order of its development kit's synsets).
    """


class ImageFolderSource:
    """The pictures of a folder, sorted by their path."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._stream = context.stream
        self._folder = absolute(config.path, context.root)
        self._label = label(self._folder, context.root)
        if not self._folder.exists():
            raise nothing_at(config.path, self._folder)
        if not self._folder.is_dir():
            raise DataError(f"'{config.path}' is a file ({self._folder}); an image-folder source reads a folder")
        self._names = sorted(_pictures(self._folder, config.recursive))
        if not self._names:
            raise DataError(f"no pictures in {self._folder} (endings: {', '.join(sorted(IMAGE_SUFFIXES))})")
        self._classes = _classes(config, self._names, context.root)
        self.blocks = [len(self._names)]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with the file, if it is broken."""
        example = self._described(index)
        if self._stream == "text":
            return example
        return replace(example, image=read_file(self._folder / self._names[index], example.name))

    def texts(self) -> Iterator[str]:
        """Every caption, in stored order; missing and broken ones are left out."""
        for name in self._names:
            try:
                yield self._caption(name, name)
            except DataError:
                continue

    def records(self) -> Iterator[Example]:
        """Every example once, without its picture; those whose caption is missing or broken are left out."""
        return sound_examples(self._described, len(self))

    def _described(self, index: int) -> Example:
        """The example of that number, less its picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        name, class_name = self._names[index], self._classes[index]
        where = f"{self._label}/{name}"
        text = self._caption(name, where) if self._stream != "image" else None
        if self._stream == "text":
            return Example(where, text=text)
        facts = {"id": name} | ({"label": class_name} if class_name else {})
        return Example(where, text=text, image_id=index, facts=facts)

    def _caption(self, name: str, where: str) -> str:
        path = (self._folder / name).with_suffix(".txt")
        caption = decode_utf8(read_file(path, where), f"{where}: {path.name}").strip()
        return checked_text(caption, path.name, where)


def _pictures(folder: Path, recursive: bool) -> Iterator[str]:
    """Paths below `folder` of all files that end like a picture."""
    for place, folders, files in os.walk(folder):
        for file in files:
            if not file.startswith(".") and file.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                yield (Path(place) / file).relative_to(folder).as_posix()
        if not recursive:
            folders.clear()


def _classes(config: Config, names: Sequence[str], root: Path) -> list[str]:
    """The class of each picture, "" where it has none; DataError for one outside of the list of classes."""
    classes = None
    if config.classes is not None:
        classes = class_list(absolute(config.classes, root), config.classes)
    if config.labels is not None:
        return picture_labels(absolute(config.labels, root), names, classes, config.labels)
    folders = [name.rpartition("/")[0] for name in names]
    if classes is not None:
        for folder, name in dict(zip(folders, names, strict=True)).items():
            if not folder:
                raise DataError(f"{config.path}/{name}: lies in no folder that names its class; give `labels`")
            checked_class(folder, classes, f"{config.path}/{name}")
    return folders


def open_source(config: Config, context: SourceContext) -> ImageFolderSource:
    """The folder that `config.path` names."""
    return ImageFolderSource(config, context)
