"""The raw trace: a record of every token in every sparse layer, as JSON lines or parquet."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmoe_core.analysis.routing.tokens import KINDS
from vlmoe_core.analysis.routing.trace import Rows
from vlmoe_core.data.batch import Batch
from vlmoe_core.errors import UsageError

Columns = Mapping[str, Sequence[Any]]
Write = Callable[[Columns], None]


def columns_of(rows: Rows, batch: Batch, names: Sequence[str], pieces: Sequence[str]) -> Columns:
    """The tokens of one modality in one layer: what each is, and experts, gates and kept of its k choices.

    `token` is null for an image's.

    Args:
        rows: the tokens.
        batch: that they belong to.
        names: of the batch's examples.
        pieces: the text of each token id.
    """
    cell, plan, facts = rows.cell, rows.plan, rows.facts
    tokens = plan.expert_TK.shape[0]
    sequences, examples = facts.sequence_T.tolist(), batch.example_of_sequence.tolist()
    text = cell.modality == "text"
    return {
        "task": [cell.task] * tokens,
        "layer": [cell.layer] * tokens,
        "modality": [cell.modality] * tokens,
        "example": [names[examples[sequence]] for sequence in sequences],
        "sequence": sequences,
        "place": facts.place_T.tolist(),
        "kind": [KINDS[cell.modality][kind] for kind in facts.kind_T.tolist()],
        "token": [pieces[i] for i in batch.text_ids_T.tolist()] if text else [None] * tokens,
        "experts": plan.expert_TK.tolist(),
        "gates": plan.probs_TE.gather(1, plan.expert_TK).tolist(),
        "kept": plan.kept_TK.tolist(),
    }


@contextmanager
def raw_file(path: Path) -> Iterator[Write]:
    """Write records to a file, whole or not at all.

    Raises UsageError for an ending other than .jsonl and .parquet, without the package for it, and if the disk refuses.
    """
    writers = {".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in writers or path.is_dir():
        raise UsageError(f"--raw {path}: give a file that ends in .jsonl or .parquet")
    beside = path.with_name(path.name + ".tmp")
    try:
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.touch()
        with writers[path.suffix](beside) as write:
            yield lambda columns: _guarded(path, write, columns)
        with _told(path):
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _guarded(path: Path, write: Write, columns: Columns) -> None:
    with _told(path):
        write(columns)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the disk refuses is said of the file; what else goes wrong meanwhile is not."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--raw {path} can't be written: {error.strerror or error}; choose another file") from error


@contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:

        def write(columns: Columns) -> None:
            for values in zip(*columns.values(), strict=True):
                file.write(json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("--raw: parquet needs pyarrow; pip install -e '.[data]', or take a .jsonl file") from error
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("task", "modality", "example", "kind", "token")),
            *((name, pa.int32()) for name in ("layer", "sequence", "place")),
            ("experts", pa.list_(pa.int32())),
            ("gates", pa.list_(pa.float32())),
            ("kept", pa.list_(pa.bool_())),
        ]
    )
    with pq.ParquetWriter(path, schema) as file:
        yield lambda columns: file.write_table(pa.table(dict(columns), schema=schema))
