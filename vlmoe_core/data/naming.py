"""What the sources of a recipe are called in public: never by a folder of this machine."""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from vlmoe_core.data.config import STREAMS, SourceConfig, SplitConfig, StreamName

SCENES = "vlmoe scenes (drawn)"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
FILE_FIELDS = ("path", "questions", "annotations")
"""Fields of a source that name its files."""
TOLD = ("task", "split", "size", "combinations", "part", "subset", "revision")
"""Fields that say which part of a source is read, and hold no path."""


def public_name(source: SourceConfig) -> str:
    """The Hub's name of a data set, `vlmoe scenes (drawn)`, or the kind of source with the names of its files.

    Only a data set of the Hub has a name without a space.
    """
    if source.source == "scenes":
        return SCENES
    hub = getattr(source, "hub", None)
    if isinstance(hub, str) and HUB_NAME.fullmatch(hub):
        return hub
    files = dict.fromkeys(_file_names([*_files(source), *([hub] if isinstance(hub, str) else [])]))
    return f"{source.source}: {', '.join(files)}" if files else f"{source.source} source"


def public_details(source: SourceConfig) -> str:
    """Which part of the source is read, as far as the recipe says so: `task vqa, split test, size 1000`."""
    said = ((name, getattr(source, name, None)) for name in TOLD)
    return ", ".join(f"{name} {_plain(value)}" for name, value in said if value is not None)


def public_names(split: SplitConfig, streams: Sequence[StreamName] = STREAMS) -> str:
    """The names of all sources of a split, each once."""
    return ", ".join(dict.fromkeys(public_name(source) for stream in streams for source in getattr(split, stream)))


def is_hub_data(name: str) -> bool:
    """Whether a public name is that of a data set on the Hub."""
    return HUB_NAME.fullmatch(name) is not None


def file_name(path: str) -> str:
    """The last part of a path, with / or \\ between its parts; what is no Unicode becomes `?`."""
    return PurePath(path.replace("\\", "/")).name.encode(errors="replace").decode()


def _files(source: SourceConfig) -> Iterator[str]:
    for field in FILE_FIELDS:
        value = getattr(source, field, None)
        yield from (value,) if isinstance(value, str) else value or ()


def _file_names(paths: Sequence[str]) -> list[str]:
    return [name for path in paths if (name := file_name(path)) not in ("", ".", "..")]


def _plain(value: object) -> str:
    return " to ".join(map(str, value)) if isinstance(value, tuple) else str(value)
