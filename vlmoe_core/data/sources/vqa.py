"""Visual question answering in the files of VQA v2: questions JSON, annotations JSON and a folder of pictures.

VQA v2.0 as published (Goyal et al. 2017, "Making the V in VQA Matter"): `{"questions": [{"question_id", "image_id",
"question"}]}` and `{"annotations": [{"question_id", "image_id", "answers": [{"answer"}], "multiple_choice_answer",
"answer_type", "question_type"}]}`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from string import Formatter
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import (
    SliceReader,
    absolute,
    as_list,
    checked_text,
    find_files,
    label,
    parse_object,
    read_file,
    require_stream,
    sound_examples,
)
from vlmoe_core.data.index import Columns, columns_of, load_index
from vlmoe_core.data.json_lists import list_items
from vlmoe_core.errors import DataError

COLUMNS = ("start", "size", "question", "image")
FACTS = {"answer": "multiple_choice_answer", "answer_type": "answer_type", "question_type": "question_type"}
"""Name of a fact: the annotation's field that holds it, where there is one."""
EXAMPLE_PATTERN = "train2014/COCO_train2014_{image_id:012d}.jpg"


class Config(SourceConfig):
    """Questions and annotations of VQA v2, or files made like them."""

    questions: tuple[str, ...]
    """Questions JSON, one file or a list, relative to `data.root`; `*` and `**` match as in a shell."""
    annotations: tuple[str, ...] | None = None
    """Annotations JSON of all these questions, one file or a list; null: the answers are hidden (test sets)."""
    images: str
    """Picture of an image id, relative to `data.root`: `train2014/COCO_train2014_{image_id:012d}.jpg`."""

    @field_validator("questions", "annotations", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return as_list(value)

    @field_validator("images")
    @classmethod
    def _is_a_pattern(cls, value: str) -> str:
        try:
            names = [name for _, name, _, _ in Formatter().parse(value) if name is not None]
            usable = set(names) == {"image_id"} and value.format(image_id=1) != value.format(image_id=2)
        except (ValueError, LookupError):
            usable = False
        if not usable:
            raise ValueError(f"'{value}' is no pattern of pictures: it must hold {{image_id}}, as {EXAMPLE_PATTERN}")
        return value


class VqaSource:
    """One example a question."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        require_stream("vqa", context.stream, "pair")
        self._images = config.images
        self._root = context.root
        self._questions = VqaRecords("questions", config.questions, context.root)
        self._annotations = None
        if config.annotations is not None:
            self._annotations = VqaRecords("annotations", config.annotations, context.root)
            self._annotation_of = match(self._questions, self._annotations)
        # COCO's ids are sparse, and other files' may be of any size: pictures are numbered anew.
        self._picture = np.unique(self._questions.image, return_inverse=True)[1]
        self.blocks = self._questions.blocks

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Example:
        """The question of that number; DataError, with file and question id, if it is broken."""
        example = self._described(index)
        path = absolute(self._images.format(image_id=int(self._questions.image[index])), self._root)
        return replace(example, image=read_file(path, example.name))

    def texts(self) -> Iterator[str]:
        """Every question, in stored order; broken ones are left out."""
        return (example.text for example in self.records() if example.text)

    def records(self) -> Iterator[Example]:
        """Every question once, without its picture; broken ones are left out."""
        return sound_examples(self._described, len(self))

    def _described(self, index: int) -> Example:
        """The example of that number, less its picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        where, fields = self._questions.read(index)
        if "question" not in fields:
            raise DataError(f"{where}: has no field 'question'; its fields: {', '.join(fields)}")
        text = checked_text(fields["question"], "question", where)
        facts: dict[str, Any] = {"id": int(self._questions.question[index])}
        if self._annotations is not None:
            facts |= annotated_facts(*self._annotations.read(int(self._annotation_of[index])))
        return Example(where, text=text, image_id=int(self._picture[index]), facts=facts)


class VqaRecords:
    """The objects of one list, `questions` or `annotations`, of all its files. Only places and ids are in memory."""

    def __init__(self, name: str, patterns: tuple[str, ...], root: Path) -> None:
        files = find_files(patterns, root)
        self._labels = [label(path, root) for path in files]
        self._index = load_index(files, "vqa-1", (name,), lambda path: index_list(path, name, label(path, root)))
        self._reader = SliceReader()
        self.question: NDArray[np.int64] = self._index.columns["question"]
        """Question id of each record."""
        self.image: NDArray[np.int64] = self._index.columns["image"]
        """Image id of each record."""
        self.blocks = self._index.blocks(np.ones(len(self._index), dtype=np.int64))
        """Records of each file."""
        ids, counts = np.unique(self.question, return_counts=True)
        if len(ids) < len(self.question):
            repeated = int(ids[counts > 1][0])
            second = int(np.flatnonzero(self.question == repeated)[1])
            raise DataError(f"{self.where(second)}: this question_id stands in '{name}' more than once")

    def __len__(self) -> int:
        return len(self._index)

    def where(self, record: int) -> str:
        """How messages name a record."""
        return f"{self._labels[self._index.file[record]]}:question {self.question[record]}"

    def read(self, record: int) -> tuple[str, Mapping[str, Any]]:
        """How messages name a record, and its content."""
        where = self.where(record)
        start, size = (int(self._index.columns[name][record]) for name in ("start", "size"))
        return where, parse_object(self._reader.read(self._index.path(record), start, size, where), where)


def index_list(path: Path, name: str, where: str) -> Columns:
    """Columns start, size (bytes), question and image (ids), one row an object of the list `name`.

    Raises DataError, beginning with `where` (the file), if the file is broken or an object has no ids.
    """
    return columns_of(COLUMNS, _rows(path, name, where))


def _rows(path: Path, name: str, where: str) -> Iterator[tuple[int, ...]]:
    for item in list_items(path, name, where):
        question, image = item.fields.get("question_id"), item.fields.get("image_id")
        if not is_id(question) or not is_id(image):
            raise DataError(
                f"{where}: item {item.number} of '{name}' must have whole numbers as question_id and image_id, "
                f"not {question!r} and {image!r}"
            )
        yield item.start, item.size, question, image


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number that a column can hold."""
    return type(value) is int and 0 <= value < 2**63


def match(questions: VqaRecords, annotations: VqaRecords) -> NDArray[np.int64]:
    """Number of the annotation of each question.

    Raises DataError for a question without annotation, an annotation without question, and a pair that names
    different pictures.
    """
    for one, other, lacking in ((questions, annotations, "annotation"), (annotations, questions, "question")):
        alone = np.flatnonzero(~np.isin(one.question, other.question))
        if len(alone):
            raise DataError(
                f"{one.where(int(alone[0]))}: has no {lacking} ({len(alone)} of {len(one)} have none); "
                "give the questions and annotations of the same split"
            )
    order = np.argsort(annotations.question)
    found = order[np.searchsorted(annotations.question, questions.question, sorter=order)]
    differ = np.flatnonzero(annotations.image[found] != questions.image)
    if len(differ):
        first = int(differ[0])
        raise DataError(
            f"{questions.where(first)}: is about image {questions.image[first]}, its annotation about image "
            f"{annotations.image[found[first]]}"
        )
    return np.asarray(found, dtype=np.int64)


def annotated_facts(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`answers` as written, and `answer`, `answer_type`, `question_type` where the annotation has them.

    Raises DataError, beginning with `where`, if they are not strings or there is no answer.
    """
    given = fields.get("answers")
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: 'answers' must be a list of at least one human answer, not {given!r}")
    for entry in given:
        if not isinstance(entry, dict) or not isinstance(entry.get("answer"), str):
            raise DataError(f'{where}: an answer must be an object {{"answer": "..."}}, not {entry!r}')
    facts: dict[str, Any] = {"answers": tuple(entry["answer"] for entry in given)}
    for name, key in FACTS.items():
        if key in fields:
            if not isinstance(fields[key], str):
                raise DataError(f"{where}: '{key}' must be a string, not {fields[key]!r}")
            facts[name] = fields[key]
    return facts


def open_source(config: Config, context: SourceContext) -> VqaSource:
    """The files that `config` names."""
    return VqaSource(config, context)
