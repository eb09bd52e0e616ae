"""Large numbers as people read them."""

from collections.abc import Sequence

BYTES = (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40))
COUNTS = (("", 1), ("k", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12))
OPERATIONS = (
    ("FLOP", 1),
    ("MFLOP", 10**6),
    ("GFLOP", 10**9),
    ("TFLOP", 10**12),
    ("PFLOP", 10**15),
    ("EFLOP", 10**18),
    ("ZFLOP", 10**21),
)

Units = Sequence[tuple[str, int]]
"""Names with their sizes, the smallest first."""


def column(values: Sequence[float | None], units: Units) -> list[str]:
    """Numbers below each other, all in the unit of the largest, their points in one line; null is a dash."""
    name, size = _unit(max((value for value in values if value is not None), default=0), units)
    return aligned(["-" if value is None else f"{value / size:,.2f} {name}" if value else "0" for value in values])


def one(value: float, units: Units) -> str:
    """A number of three digits in the unit that fits it."""
    name, size = _unit(value, units)
    number = value / size
    digits = 0 if size == 1 or number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{digits}f} {name}".rstrip()


def aligned(cells: Sequence[str]) -> list[str]:
    """Cells of one width, their ends in one line."""
    width = max(map(len, cells), default=0)
    return [cell.rjust(width) for cell in cells]


def _unit(value: float, units: Units) -> tuple[str, int]:
    return next(((name, size) for name, size in reversed(units) if value >= size), units[0])
