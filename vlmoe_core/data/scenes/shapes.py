"""The ten shapes as sets of points: implicit functions in whole numbers, thousandths of the radius, y down."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]

_STAR_NORMALS = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))
_STAR_REACH = 309


def _circle(x: Ints, y: Ints) -> Mask:
    return x * x + y * y <= 920**2


def _square(x: Ints, y: Ints) -> Mask:
    return (abs(x) <= 820) & (abs(y) <= 820)


def _triangle(x: Ints, y: Ints) -> Mask:
    return (y <= 800) & (1700 * abs(x) <= 980 * (y + 900))


def _star(x: Ints, y: Ints) -> Mask:
    """A pentagram: the points inside at least four of the five lines that its edges lie on."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.int8)
    for normal_x, normal_y in _STAR_NORMALS:
        inside += normal_x * x + normal_y * y <= _STAR_REACH * 1000
    return inside >= 4


def _cross(x: Ints, y: Ints) -> Mask:
    return ((abs(x) <= 320) & (abs(y) <= 950)) | ((abs(y) <= 320) & (abs(x) <= 950))


def _diamond(x: Ints, y: Ints) -> Mask:
    return 10 * abs(x) + 7 * abs(y) <= 7000


def _hexagon(x: Ints, y: Ints) -> Mask:
    return (abs(y) <= 831) & (831 * abs(x) + 480 * abs(y) <= 831 * 960)


def _heart(x: Ints, y: Ints) -> Mask:
    """Two discs, the block between them, and the wedge of their outer tangents."""
    x = abs(x)
    discs = (x - 430) ** 2 + (y + 330) ** 2 <= 480**2
    between = (x <= 430) & (y >= -330) & (y <= 0)
    wedge = (y >= -16) & (756 * x + 655 * y <= 655 * 900)
    return discs | between | wedge


def _ring(x: Ints, y: Ints) -> Mask:
    square = x * x + y * y
    return (square <= 950**2) & (square >= 500**2)


def _crescent(x: Ints, y: Ints) -> Mask:
    return (x * x + y * y <= 950**2) & ((x - 420) ** 2 + (y + 120) ** 2 >= 720**2)


INSIDE: Mapping[str, Callable[[Ints, Ints], Mask]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "hexagon": _hexagon,
    "heart": _heart,
    "ring": _ring,
    "crescent": _crescent,
}
"""For each shape, which points (x, y), in thousandths of the radius from the centre, belong to it."""
