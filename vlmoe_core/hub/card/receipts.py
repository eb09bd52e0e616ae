"""What a card reads of the receipts that import, upcycling and export leave: `import.json` and so on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from vlmoe_core.errors import CheckpointError
from vlmoe_core.hub.export.measure import Measured

IMPORTED, UPCYCLED, EXPORTED = "import.json", "upcycle.json", "export.json"


@dataclass(frozen=True)
class Imported:
    """Whose weights these are."""

    family: str
    source: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Where each is from, or `new: ` and the reason."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moved:
    """How far the upcycled model is from the dense one."""

    states: float
    """Largest difference of the final states."""


@dataclass(frozen=True)
class Upcycled:
    """Which dense model the experts are copies of."""

    source: str
    step: int
    experts: int
    examples: Mapping[str, int]
    difference: Moved


@dataclass(frozen=True)
class Size:
    """Of a model."""

    parameters: int


@dataclass(frozen=True)
class Quantised:
    """How much is int8."""

    values_quantised: int
    values_total: int


@dataclass(frozen=True)
class Exported:
    """What an export changed."""

    format: str
    before: Size
    after: Size
    options: Mapping[str, Any] = field(default_factory=dict)
    quantised: Quantised | None = None
    metric_before: Measured | None = None
    metric_after: Measured | None = None


Receipt = TypeVar("Receipt", Imported, Upcycled, Exported)


def read_receipt(path: Path | None, kind: type[Receipt]) -> Receipt | None:
    """A receipt; none where there is no file. Raises CheckpointError, naming it, for anything else."""
    if path is None:
        return None
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise CheckpointError(
            f"{path} is no receipt of vlmoe ({where}); take it out, or take it from a copy"
        ) from error
