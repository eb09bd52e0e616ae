"""results/: what `vlmoe eval` measured, kept in the folder of the run that it measured."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlmoe_core.checkpoint.manifest import dump_json
from vlmoe_core.errors import CheckpointError, TrainError

FOLDER = "results"
FORMAT = 1


@dataclass(frozen=True)
class StoredResult:
    """What a model reached on a split, in percent, and what it was measured on. It holds no path."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    task: str
    """vqa, nlvr2, retrieval, classification or nli."""
    data: str
    """What the data are called in public (data/naming.py)."""
    split: str
    """train, eval or test."""
    step: int
    """Optimiser steps of the model that was measured."""
    n: int
    """Examples that were scored."""
    limit: int | None
    """Only so many first examples were read; null: all."""
    broken: int
    """Examples that were left out as broken."""
    created: int
    """When, in seconds since 1970."""
    metrics: Mapping[str, float]
    """By name."""
    intervals: Mapping[str, tuple[float, float]]
    """Their 95 % bootstrap intervals."""
    baselines: Mapping[str, Mapping[str, float]]
    """Metrics of what has not seen the pictures, or nothing at all; by the name of the baseline."""
    baseline_intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    """Theirs."""


def save_result(run: Path, report: Mapping[str, Any], data: str, step: int, limit: int | None) -> Path:
    """Keep a result as `results/<task>-<split>.json`, in place of an older one on the same data.

    One of the first examples alone, or of other data than the one that lies there, gets a name of its own.

    Args:
        run: the folder of the run or model that was measured.
        report: of `vlmoe_core.train.scoring.report`; what it says of paths is left out.
        data: what the data are called in public, as `vlmoe_core.data.naming.public_names` says.
        step: optimiser steps of the model.
        limit: at most so many examples were read; null: all.

    Raises:
        TrainError: the disk refuses.
    """
    kept = ("task", "split", "n", "broken", "metrics", "intervals", "baselines", "baseline_intervals")
    cut = limit if limit is not None and report["n"] + report["broken"] >= limit else None
    result = StoredResult(
        **{name: report[name] for name in kept}, data=data, step=step, limit=cut, created=int(time.time())
    )
    path = _place_of(result, run / FOLDER)
    body = {"format": FORMAT, **asdict(result)}
    try:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp")
        partial.write_text(_dump(body | {"digest": _digest(body)}), encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        raise TrainError(f"the result can't be kept in {path}: {error.strerror or error}") from error
    return path


def read_results(folder: Path) -> list[StoredResult]:
    """The results that lie in `results/` of a run or model folder, sorted by file name.

    Raises:
        CheckpointError: a file is altered, of a newer format, or no result; names it.
    """
    return [read_result(path) for path in sorted((folder / FOLDER).glob("*.json"))]


def read_result(path: Path) -> StoredResult:
    """One of them; errors likewise."""
    foreign = CheckpointError(f"{path} is no result of vlmoe eval; take it out of {FOLDER}/")
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise foreign from error
    if not isinstance(body, dict) or not isinstance(body.get("format"), int):
        raise foreign
    if body["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {body['format']}, this vlmoe reads {FORMAT}: install a newer vlmoe")
    if body.pop("digest", None) != _digest(body):
        raise CheckpointError(f"{path} has been altered; measure anew with vlmoe eval, or remove it")
    try:
        return TypeAdapter(StoredResult).validate_json(json.dumps({k: v for k, v in body.items() if k != "format"}))
    except ValidationError as error:
        raise foreign from error


def _place_of(result: StoredResult, folder: Path) -> Path:
    first = "" if result.limit is None else f"-first-{result.limit}"
    path = folder / f"{result.task}-{result.split}{first}.json"
    try:
        same = not path.exists() or read_result(path).data == result.data
    except CheckpointError:
        same = True
    mark = hashlib.sha256(result.data.encode(errors="backslashreplace")).hexdigest()[:8]
    return path if same else path.with_name(f"{path.stem}-{mark}.json")


def _dump(body: Mapping[str, Any]) -> str:
    """In the order of the task's own table."""
    return json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(body).encode(errors="backslashreplace")).hexdigest()
