"""state.json: what a run needs to go on, beside its tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlmoe_core.checkpoint.manifest import dump_json
from vlmoe_core.errors import CheckpointError


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` optimiser steps. No random state: all generators are seeded from (seed, step)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: int
    """Optimiser steps that are done."""
    positions: Mapping[str, int]
    """The next position of each data stream."""
    scaler: Mapping[str, int | float] | None = None
    """State of the fp16 gradient scaler; None in other precisions."""
    best_score: float | None = None
    """Best held-out score so far; None before the first evaluation."""
    best_step: int | None = None
    """Step of that score."""
    metrics_offset: int = 0
    """Bytes of metrics.jsonl that belong to the steps so far: a resumed run cuts the file here."""
    recipe: str = ""
    """Name of the recipe, for people to read."""
    tracker_run: str = ""
    """Under which id wandb and trackio know the run: a resumed run goes on there."""


def write_state(path: Path, state: RunState) -> None:
    """Write state.json.

    Raises:
        CheckpointError: a number is infinite or NaN, which JSON can't hold.
    """
    try:
        path.write_text(dump_json(asdict(state)), encoding="utf-8")
    except ValueError as error:
        raise CheckpointError(f"the state of the run can't be written to {path.name}: {error}") from error


def read_state(path: Path) -> RunState:
    """Read state.json.

    Raises:
        CheckpointError: a field is missing, unknown or of the wrong type.
    """
    try:
        return TypeAdapter(RunState).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CheckpointError(f"{path} does not hold the state of a run: {where}: {first['msg']}") from error
