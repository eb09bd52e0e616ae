"""A folder of pictures; the folders in it are classes, and NAME.txt beside NAME.jpg is its caption."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import IMAGE_SUFFIXES, absolute, checked_text, decode_utf8, label, nothing_at, read_file
from vlmoe_core.errors import DataError


class Config(SourceConfig):
    """A folder of pictures, with the folders in it as classes."""

    path: str
    """The folder, relative to `data.root`."""
    recursive: bool = True
    """Read the folders inside as well; links to folders are not followed."""


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
        self.blocks = [len(self._names)]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with the file, if it is broken."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        name = self._names[index]
        where = f"{self._label}/{name}"
        text = self._caption(name, where) if self._stream != "image" else None
        if self._stream == "text":
            return Example(where, text=text)
        parent = PurePosixPath(name).parent.as_posix()
        facts = {} if parent == "." else {"class": parent}
        return Example(where, read_file(self._folder / name, where), text, index, facts)

    def texts(self) -> Iterator[str]:
        """Every caption, in stored order; missing and broken ones are left out."""
        for name in self._names:
            try:
                yield self._caption(name, name)
            except DataError:
                continue

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


def open_source(config: Config, context: SourceContext) -> ImageFolderSource:
    """The folder that `config.path` names."""
    return ImageFolderSource(config, context)
