"""Numbers of a recipe as they were written."""

from fractions import Fraction


def exact(value: float) -> Fraction:
    """The number as it was written in decimal: 1.1 is 11/10, not the nearest binary fraction."""
    return Fraction(str(value))
