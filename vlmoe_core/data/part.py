"""A share of what a file holds, from and to: so that one file serves as training and as held-out part."""

import math
from typing import Annotated

from pydantic import AfterValidator

from vlmoe_core.decimals import exact

WHOLE = (0.0, 1.0)


def _is_a_range(part: tuple[float, float]) -> tuple[float, float]:
    low, high = part
    if not 0 <= low < high <= 1:
        raise ValueError(f"part must be two numbers 0 <= from < to <= 1, not ({low}, {high})")
    return part


Part = Annotated[tuple[float, float], AfterValidator(_is_a_range)]
"""(from, to): (0, 0.9) and (0.9, 1) share nothing and leave nothing out."""


def part_of(count: int, part: Part) -> slice:
    """Which of `count` things in order are in the part. The shares count as written: 0.9 is 9/10."""
    first, last = (math.floor(count * exact(share)) for share in part)
    return slice(first, last)
