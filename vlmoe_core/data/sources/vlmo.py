"""The Arrow tables of VLMo and ViLT as their scripts write them (microsoft/unilm, vlmo/vlmo/utils/write_*.py).

One row a picture, with lists of texts; an example is (row, j-th text). What a table is follows from its columns:

- vqav2_*: image, questions, question_id, answers and answer_scores (lists of lists; empty in test tables);
- nlvr2_*: image_0, image_1, questions, answers ("True", "False"), identifier (of the pair, not the statement);
- coco_caption_karpathy_*, f30k_caption_karpathy_*, vg, sbu_*, conceptual_caption_*: image, caption;
- wikibk_train_*: caption, one sentence a row, and no picture.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import FilesConfig, checked_text, find_files, label, sound_examples, usable_texts
from vlmoe_core.data.index import Numbering
from vlmoe_core.data.mapped import MappedTable
from vlmoe_core.errors import DataError

TRUTHS = ("True", "False")


class Config(FilesConfig):
    """Arrow files of VLMo or ViLT; the files of one source may be tables of different kinds."""


class VlmoSource:
    """The rows of tables, memory-mapped; a row is one example of `image`, each text of it one of `pair` and `text`."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._stream = context.stream
        files = find_files(config.path, context.root)
        self._tables = [MappedTable(path, label(path, context.root)) for path in files]
        for table in self._tables:
            _check_columns(table, context.stream)
        self._first_rows = np.cumsum([0, *map(len, self._tables)])
        counts = [
            np.ones(len(table), dtype=np.int64) if self._stream == "image" else table.lengths(text_column(table))
            for table in self._tables
        ]
        self._numbering = Numbering(np.concatenate(counts))
        self.blocks = [int(count.sum()) for count in counts if len(count)]

    def __len__(self) -> int:
        return len(self._numbering)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with file and row, if it is broken."""
        example = self._described(index)
        if self._stream == "text":
            return replace(example, image_id=-1)
        table, row, _ = self._locate(index)
        first, *others = (_picture(table, column, row, example.name) for column in picture_columns(table))
        return replace(example, image=first, more_images=tuple(others))

    def texts(self) -> Iterator[str]:
        """Every question or caption, in stored order; broken ones are left out."""
        for table in self._tables:
            column = text_column(table)
            for value in table.values(column) if column in table.columns else ():
                yield from usable_texts(value if isinstance(value, list) else [value])

    def records(self) -> Iterator[Example]:
        """Every example once, in stored order, without its pictures; broken ones are left out."""
        return sound_examples(self._described, len(self))

    def _locate(self, index: int) -> tuple[MappedTable, int, int]:
        """(table, row of it, number of the text) of an example."""
        record, nth = self._numbering.locate(index)
        number = int(np.searchsorted(self._first_rows, record, side="right")) - 1
        return self._tables[number], record - int(self._first_rows[number]), nth

    def _described(self, index: int) -> Example:
        """The example without its pictures."""
        table, row, nth = self._locate(index)
        record, _ = self._numbering.locate(index)
        where = f"{table.name}:{row}"
        if self._stream == "image":
            return Example(where, image_id=record)
        column = text_column(table)
        text = checked_text(_item(table.value(column, row), nth), column, where)
        facts = {} if column == "caption" or self._stream == "text" else _facts(table, row, nth, where)
        return Example(where, text=text, image_id=record, facts=facts)


def text_column(table: MappedTable) -> str:
    """`questions` where a table has them, else `caption`."""
    return "questions" if "questions" in table.columns else "caption"


def picture_columns(table: MappedTable) -> tuple[str, ...]:
    """The columns of pictures."""
    return ("image_0", "image_1") if "image_0" in table.columns else ("image",)


def _check_columns(table: MappedTable, stream: str) -> None:
    """DataError if the table has not the columns that the stream needs."""
    if stream == "image" and len(picture_columns(table)) > 1:
        raise DataError(f"{table.name}: has statements on two pictures (nlvr2); name it under 'pair'")
    wanted = () if stream == "text" else picture_columns(table)
    for column in (*wanted, *((text_column(table),) if stream != "image" else ())):
        if column not in table.columns:
            raise DataError(f"{table.name}: has no column '{column}'; its columns: {', '.join(table.columns)}")
    for column in wanted:
        if "string" in table.kind(column):
            raise DataError(
                f"{table.name}: its column '{column}' holds words, not pictures, so it has no examples for the "
                f"{stream} stream; name a table of texts (wikibk) under 'text'"
            )


def _item(value: Any, nth: int) -> Any:
    """The nth of a list, or the value itself where it is none; None where there is no such item."""
    if not isinstance(value, list):
        return value
    return value[nth] if nth < len(value) else None


def _picture(table: MappedTable, column: str, row: int, where: str) -> bytes:
    value = table.value(column, row)
    if not isinstance(value, bytes) or not value:
        raise DataError(f"{where}: column '{column}' holds no picture but {str(value)[:40]!r}")
    return value


def _facts(table: MappedTable, row: int, nth: int, where: str) -> dict[str, Any]:
    """What a table of questions or statements tells of one of them."""
    cells = {name: table.value(name, row) for name in table.columns if not name.startswith("image")}
    if "image_0" in table.columns:
        label_of = _item(cells.get("answers"), nth)
        if label_of not in (*TRUTHS, None):
            raise DataError(f"{where}: an answer must be 'True' or 'False', not {label_of!r}")
        return _present(id=cells.get("identifier"), label=label_of)
    return _present(id=_item(cells.get("question_id"), nth), scores=_scores(cells, nth, where))


def _scores(cells: dict[str, Any], nth: int, where: str) -> dict[str, float] | None:
    """Soft target of each answer of a question; None in test tables."""
    answers, scores = (_item(cells.get(name) or None, nth) for name in ("answers", "answer_scores"))
    if not answers and not scores:
        return None
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise DataError(f"{where}: 'answers' and 'answer_scores' must hold lists of equal length for each question")
    return {str(answer): float(score) for answer, score in zip(answers, scores, strict=True)}


def _present(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def open_source(config: Config, context: SourceContext) -> VlmoSource:
    """The tables that `config.path` names."""
    return VlmoSource(config, context)
