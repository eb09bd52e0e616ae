"""The JSON-lines index files of BEiT-3 as they are (microsoft/unilm, beit3/datasets.py).

Each line names a picture and holds its text as token ids, without those that begin and end a text. What else a line is
follows from its fields:

- VQA: `labels` and `scores`, numbers of answers and their soft targets (both empty in test files), and `qid`;
- NLVR2: `image2_path`, `label` 1 or 0, `identifier`;
- ImageNet: `label`, the number of a class, and no text;
- retrieval and captioning: nothing more.

Ids mean nothing without the tokenizer that wrote them: a recipe names it with `tokenizers.text.load`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from vlmoe_core.data.class_files import answer_list, class_list
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
    sound_examples,
)
from vlmoe_core.data.index import Columns, Numbering, columns_of, load_index
from vlmoe_core.errors import DataError

TRUTH = {1: "True", 0: "False"}


class Config(FilesConfig):
    """Index files of BEiT-3, such as vqa.train.jsonl, nlvr2.dev.index.jsonl, flickr30k.test.jsonl."""

    images: str = "."
    """Folder from which image_path and image2_path start, relative to `data.root`."""
    answers: str | None = None
    """answer2label.txt, which names the numbers in `labels`: JSON lines {"answer": ..., "label": ...}; for VQA."""
    classes: str | None = None
    """List of the classes, the first word of line 1 for label 0 (a synset list); null: the number is the name."""


class Beit3Source:
    """The lines of index files; a picture is one example of `image`, a line one of `pair` and of `text`."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._stream = context.stream
        self._root = context.root
        self._folder = absolute(config.images, context.root)
        self._answers = None if config.answers is None else answer_list(*_one_file(config.answers, context.root))
        self._classes = None if config.classes is None else class_list(*_one_file(config.classes, context.root))
        self._index = load_index(find_files(config.path, context.root), "beit3-1", (), index_lines)
        counts = self._index.columns["first" if context.stream == "image" else "lines"]
        self._numbering = Numbering(counts)
        self.blocks = self._index.blocks(counts)
        self._reader = SliceReader()

    def __len__(self) -> int:
        return len(self._numbering)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with file and line, if it is broken."""
        record, where, fields = self._line(index)
        example = self._example(record, where, fields)
        if self._stream == "text":
            return example
        image = self._picture(fields, "image_path", where)
        more = (self._picture(fields, "image2_path", where),) if "image2_path" in fields else ()
        return replace(example, image=image, more_images=more)

    def texts(self) -> Iterator[str]:
        """Texts that are stored as words; none where the files hold token ids: no tokenizer can be fitted to those."""
        return (example.text for example in self.records() if example.text)

    def records(self) -> Iterator[Example]:
        """Every example once, in stored order, without its pictures; broken ones are left out."""
        return sound_examples(lambda index: self._example(*self._line(index)), len(self))

    def _line(self, index: int) -> tuple[int, str, Mapping[str, Any]]:
        """Number, name and fields of an example's line."""
        record, _ = self._numbering.locate(index)
        where = f"{label(self._index.path(record), self._root)}:{self._index.columns['line'][record]}"
        start, size = (int(self._index.columns[name][record]) for name in ("start", "size"))
        return record, where, parse_object(self._reader.read(self._index.path(record), start, size, where), where)

    def _example(self, record: int, where: str, fields: Mapping[str, Any]) -> Example:
        """The example without its pictures."""
        image_id = self._index.first_of_file(record) + int(self._index.columns["picture"][record])
        if self._stream == "image":
            return Example(where, image_id=image_id, facts=self._class(fields, where))
        text, ids = _segment(fields, where)
        if self._stream == "text":
            return Example(where, text=text, text_ids=ids)
        return Example(where, None, text, image_id, self._facts(fields, where), text_ids=ids)

    def _picture(self, fields: Mapping[str, Any], name: str, where: str) -> bytes:
        value = fields.get(name)
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: '{name}' must name a picture, not {value!r}")
        return read_file(inside(value, self._folder, where), where)

    def _class(self, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Label and file name of an ImageNet line; nothing for other lines."""
        if "image2_path" in fields:
            raise DataError(f"{where}: has two pictures and a statement on them (NLVR2); name it under 'pair'")
        if "label" not in fields:
            return {}
        number = fields["label"]
        known = None if self._classes is None else len(self._classes)
        if type(number) is not int or number < 0 or (known is not None and number >= known):
            raise DataError(f"{where}: 'label' must be the number of a class{_range(known)}, not {number!r}")
        name = str(number) if self._classes is None else self._classes[number]
        return {"label": name, "id": PurePosixPath(str(fields.get("image_path"))).name}

    def _facts(self, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What the file tells of a pair."""
        if "image2_path" in fields:
            return _statement(fields, where)
        told = {"id": fields["qid"]} if "qid" in fields else {}
        return told | ({"scores": self._scores(fields, where)} if fields.get("labels") else {})

    def _scores(self, fields: Mapping[str, Any], where: str) -> dict[str, float]:
        """Soft target of each answer of a VQA line."""
        labels, scores = _numbers(fields["labels"], int), _numbers(fields.get("scores"), (int, float))
        if self._answers is None:
            raise DataError(f"{where}: holds answers by number; name their list, as in 'answers: answer2label.txt'")
        if labels is None or scores is None or len(labels) != len(scores):
            raise DataError(f"{where}: 'labels' and 'scores' must be two lists of numbers, of equal length")
        unknown = [number for number in labels if not 0 <= number < len(self._answers)]
        if unknown:
            raise DataError(f"{where}: there is no answer with label {unknown[0]}{_range(len(self._answers))}")
        return {self._answers[number]: float(score) for number, score in zip(labels, scores, strict=True)}


def _statement(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Label and identifier of a line of NLVR2, as far as it has them."""
    told = {"id": fields["identifier"]} if "identifier" in fields else {}
    truth = fields.get("label")
    if truth is None:
        return told
    if type(truth) is not int or truth not in TRUTH:
        raise DataError(f"{where}: 'label' must be 1 (true) or 0 (false), not {truth!r}")
    return told | {"label": TRUTH[truth]}


def _segment(fields: Mapping[str, Any], where: str) -> tuple[str | None, tuple[int, ...] | None]:
    """The text as words or as token ids."""
    value = fields.get("text_segment")
    if isinstance(value, str):
        return checked_text(value, "text_segment", where), None
    ids = _numbers(value, int)
    if not ids or min(ids) < 0:
        raise DataError(f"{where}: 'text_segment' must be a list of token ids, or a text, not {str(value)[:60]}")
    return None, tuple(ids)


def _numbers(value: Any, kind: type | tuple[type, ...]) -> list[Any] | None:
    """The list, if it is one of numbers of a kind; true and false are none."""
    numbers = isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
    return value if numbers else None


def _range(known: int | None) -> str:
    return "" if known is None else f" (known: 0..{known - 1})"


def _one_file(name: str, root: Path) -> tuple[Path, str]:
    """A file, and how messages name it."""
    found = find_files((name,), root)
    if len(found) > 1:
        raise DataError(f"'{name}' must name one file, not {len(found)}")
    return found[0], label(found[0], root)


def index_lines(path: Path) -> Columns:
    """Columns line, start, size (bytes), picture, first and lines (always 1).

    `picture` is the number, in the file, of the first record with the same image_path; `first` says whether that is
    this one. A line that can't be read is a record of its own, which raises.
    """
    return columns_of(("line", "start", "size", "picture", "first", "lines"), _rows(path))


def _rows(path: Path) -> Iterator[tuple[int, ...]]:
    first_with: dict[str, int] = {}
    for record, (line, start, content) in enumerate(lines(path)):
        try:
            name = parse_object(content, "").get("image_path")
        except DataError:
            name = None
        picture = first_with.setdefault(name, record) if isinstance(name, str) else record
        yield line, start, len(content), picture, picture == record, 1


def open_source(config: Config, context: SourceContext) -> Beit3Source:
    """The index files that `config.path` names."""
    return Beit3Source(config, context)
