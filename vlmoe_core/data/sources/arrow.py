"""Parquet and arrow files, or a data set of the Hugging Face Hub, through the `datasets` package (extra `data`)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vlmoe_core.config import nearest
from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import checked_text, find_files, inside, read_file, text_values, usable_texts
from vlmoe_core.data.index import Numbering, cache_folder
from vlmoe_core.errors import DataError


class Config(SourceConfig):
    """Parquet or arrow files (`path`), or a data set of the Hub (`hub`)."""

    path: str | tuple[str, ...] | None = None
    """One file or a list of .parquet or .arrow files, relative to `data.root`; `*` and `**` match as in a shell."""
    hub: str | None = None
    """Name of a data set on the Hub, ORG/NAME."""
    subset: str | None = None
    """Configuration of the Hub data set, where it has several."""
    split: str = Field("train", min_length=1)
    """Split of the Hub data set."""
    revision: str | None = None
    """Commit, tag or branch of the Hub data set."""
    image_field: str = "image"
    """Column of pictures: bytes, or a record of bytes and path."""
    text_field: str = "caption"
    """Column of captions: a string, or a list of strings."""

    @model_validator(mode="after")
    def _one_place(self) -> "Config":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either 'path' (files) or 'hub' (a data set of the Hub)")
        return self


class ArrowSource:
    """The rows of a table."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._config = config
        self._stream = context.stream
        self._root = context.root
        self._name = config.hub or str(config.path)
        self._table = _without_decoding(_load(config, context), config.image_field)
        if context.stream != "text":
            self._require(config.image_field, "image_field")
        if context.stream != "image":
            self._require(config.text_field, "text_field")
        if context.stream == "text":
            self._table = self._table.select_columns([config.text_field])
        counts = self._counts()
        self._numbering = Numbering(counts)
        self.blocks = [int(counts.sum())]

    def _require(self, column: str, setting: str) -> None:
        if column not in self._table.column_names:
            raise DataError(
                f"{self._name} has no column '{column}' ({setting}); {nearest(column, self._table.column_names)}"
            )

    def _counts(self) -> NDArray[np.int64]:
        """Examples of each row; a row whose captions are missing or none is one example, which raises."""
        if self._stream == "image":
            return np.ones(len(self._table), dtype=np.int64)
        captions = self._table.select_columns([self._config.text_field])
        sizes = [max(1, len(v)) if isinstance(v, list) else 1 for v in captions[self._config.text_field]]
        return np.array(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._numbering)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with data set and row, if it is broken."""
        row_number, nth = self._numbering.locate(index)
        where = f"{self._name}:{row_number}"
        row = self._table[row_number]
        text = None
        if self._stream != "image":
            text = checked_text(text_values(row, self._config.text_field, where)[nth], self._config.text_field, where)
        if self._stream == "text":
            return Example(where, text=text)
        return Example(where, self._picture(row[self._config.image_field], where), text, row_number)

    def texts(self) -> Iterator[str]:
        """Every caption, in stored order; broken ones are left out."""
        if self._config.text_field not in self._table.column_names:
            return
        for value in self._table.select_columns([self._config.text_field])[self._config.text_field]:
            yield from usable_texts(value if isinstance(value, list) else [value])

    def _picture(self, value: Any, where: str) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return bytes(value["bytes"])
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return read_file(inside(value["path"], self._root, where), where)
        raise DataError(f"{where}: column '{self._config.image_field}' holds no picture but a {type(value).__name__}")


def _load(config: Config, context: SourceContext) -> Any:
    """The table, as a `datasets.Dataset`. What must be converted is kept under VLMOE_CACHE."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("an arrow source needs the datasets package: pip install 'vlmoe[data]'") from error
    cache = str(cache_folder() / "arrow")
    try:
        if config.hub is not None:
            return datasets.load_dataset(
                config.hub, config.subset, split=config.split, revision=config.revision, cache_dir=cache
            )
        patterns = (config.path,) if isinstance(config.path, str) else config.path or ()
        files = [str(path) for path in find_files(patterns, context.root)]
        kinds = {path.rpartition(".")[2] for path in files}
        if len(kinds) != 1 or not kinds <= {"parquet", "arrow"}:
            raise DataError(
                f"an arrow source reads .parquet or .arrow files, all of one kind, not {', '.join(files[:3])}"
            )
        return datasets.load_dataset(kinds.pop(), data_files=files, split="train", cache_dir=cache)
    except DataError:
        raise
    except Exception as error:
        # datasets raises its own errors, pyarrow's, the Hub's and the network's.
        raise DataError(f"{config.hub or config.path} can't be opened: {error}") from error


def _without_decoding(table: Any, column: str) -> Any:
    """The table with its pictures as stored bytes, so that our own checks and decoding apply."""
    import datasets

    is_image = column in table.column_names and isinstance(table.features[column], datasets.Image)
    return table.cast_column(column, datasets.Image(decode=False)) if is_image else table


def open_source(config: Config, context: SourceContext) -> ArrowSource:
    """The table that `config` names."""
    return ArrowSource(config, context)
