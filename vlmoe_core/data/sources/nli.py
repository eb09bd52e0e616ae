"""Sentence pairs as published: JSON lines of MNLI and SNLI, and the tab-separated files of GLUE.

Both name the premise `sentence1`, the hypothesis `sentence2` and the label `gold_label` or `label`.
Examples without a majority among the annotators have the label "-". They are no part of the source: its authors leave
them out of training and of scoring (S. Bowman et al., EMNLP 2015).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import (
    FilesConfig,
    SliceReader,
    checked_text,
    decode_utf8,
    find_files,
    label,
    lines,
    parse_object,
    require_stream,
    sound_examples,
)
from vlmoe_core.data.index import Columns, columns_of, load_index
from vlmoe_core.errors import DataError

LABELS = ("entailment", "neutral", "contradiction")
LABEL_FIELDS = ("gold_label", "label")
ID_FIELDS = ("index", "pairID")
NO_MAJORITY = "-"
HIDDEN = "hidden"
"""What the published MNLI test files write in place of the label."""
JSON_LINES, TABLE = ".jsonl", ".tsv"


class Config(FilesConfig):
    """Files that end in .jsonl (MNLI, SNLI, and others with their fields) or in .tsv (GLUE, with a header line)."""

    subset: str | None = None
    """What the pairs of these files are called in the metrics: matched, mismatched; null: no metric of their own."""


class NliSource:
    """The sentence pairs of some files, each a text with a second text."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        require_stream("nli", context.stream, "text")
        self._root = context.root
        self._subset = {} if config.subset is None else {"subset": config.subset}
        files = find_files(config.path, context.root)
        self._headers = {path: read_header(path, label(path, context.root)) for path in files}
        self._index = load_index(files, "nli-1", (), lambda path: index_pairs(path, self._headers[path]))
        self.blocks = self._index.blocks(self._index.columns["examples"])
        self._reader = SliceReader()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        """The pair of that number; DataError, with file and line, if it is broken."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        path = self._index.path(index)
        line, start, size = (int(self._index.columns[name][index]) for name in ("line", "start", "size"))
        where = f"{label(path, self._root)}:{line}"
        fields = read_fields(self._reader.read(path, start, size, where), self._headers[path], where)
        premise, hypothesis = (_sentence(fields, name, where) for name in ("sentence1", "sentence2"))
        return Example(where, text=premise, facts=_facts(fields, where) | self._subset, second_text=hypothesis)

    def texts(self) -> Iterator[str]:
        """Premise and hypothesis of every pair, in stored order; broken pairs are left out."""
        for example in self.records():
            yield from (text for text in (example.text, example.second_text) if text)

    def records(self) -> Iterator[Example]:
        """Every pair once, in stored order; broken ones are left out."""
        return sound_examples(self.__getitem__, len(self))


def read_header(path: Path, where: str) -> tuple[str, ...] | None:
    """The columns of a tab-separated file; null for JSON lines. DataError for other endings and missing columns."""
    if path.suffix == JSON_LINES:
        return None
    if path.suffix != TABLE:
        raise DataError(f"{where}: an nli source reads files that end in {JSON_LINES} or {TABLE}")
    first = next(lines(path), None)
    if first is None:
        raise DataError(f"{where}: is empty; its first line must name the columns")
    columns = tuple(decode_utf8(first[2], f"{where}:{first[0]}").split("\t"))
    missing = [name for name in ("sentence1", "sentence2") if name not in columns]
    if missing:
        raise DataError(f"{where}:{first[0]}: has no column '{missing[0]}'; its columns: {', '.join(columns)}")
    return columns


def read_fields(data: bytes, header: tuple[str, ...] | None, where: str) -> Mapping[str, object]:
    """The fields of one line. Quotes in a tab-separated line are plain characters, as GLUE writes them."""
    if header is None:
        return parse_object(data, where)
    values = decode_utf8(data, where).split("\t")
    if len(values) != len(header):
        raise DataError(f"{where}: has {len(values)} fields between tabs, but the header has {len(header)}")
    return dict(zip(header, values, strict=True))


def index_pairs(path: Path, header: tuple[str, ...] | None) -> Columns:
    """Columns line, start, size (bytes) and examples (always 1), one row a pair that has a majority or is broken."""
    return columns_of(("line", "start", "size", "examples"), _rows(path, header))


def _rows(path: Path, header: tuple[str, ...] | None) -> Iterator[tuple[int, ...]]:
    found = lines(path)
    if header is not None:
        next(found)
    for line, start, content in found:
        try:
            left_out = _label(read_fields(content, header, "")) == NO_MAJORITY
        except DataError:
            left_out = False
        if not left_out:
            yield line, start, len(content), 1


def _label(fields: Mapping[str, object]) -> object:
    return next((fields[name] for name in LABEL_FIELDS if name in fields), None)


def _sentence(fields: Mapping[str, object], name: str, where: str) -> str:
    if name not in fields:
        raise DataError(f"{where}: has no field '{name}'; its fields: {', '.join(fields) or 'none'}")
    return checked_text(fields[name], name, where)


def _facts(fields: Mapping[str, object], where: str) -> dict[str, object]:
    """`label` where the file tells it, and `id`."""
    facts: dict[str, object] = next(({"id": fields[name]} for name in ID_FIELDS if name in fields), {})
    given = _label(fields)
    if given is None or given == HIDDEN:
        return facts
    if given not in LABELS:
        raise DataError(f"{where}: the label must be one of {', '.join(LABELS)}, not {given!r}")
    return {**facts, "label": given}


def open_source(config: Config, context: SourceContext) -> NliSource:
    """The files that `config.path` names."""
    return NliSource(config, context)
