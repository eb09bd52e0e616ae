"""The textured grounds, in whole numbers only: a muted colour that a texture mixes with a second shade of itself."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.data.scenes.world import SIDE, Ground

Ints = NDArray[np.int32]

_SAMPLES = 2
"""Samples along each side of a pixel."""

TONE_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "grey": (176, 176, 176),
    "sand": (206, 196, 172),
    "sage": (172, 186, 166),
    "mist": (172, 184, 198),
    "mauve": (190, 176, 190),
    "slate": (126, 134, 148),
    "clay": (188, 168, 156),
    "moss": (140, 148, 128),
}


def is_dark(ground: Ground) -> bool:
    """True for the tones slate and moss: darker than all others, whatever the texture makes of them."""
    return sum(TONE_COLOURS[ground.tone]) < 3 * _DARK


_DARK = 155
"""Mean of the channels below which a tone is dark, of 255."""
_FULL = 256
"""Weight at which only the second shade is left."""
_CONTRAST = 26
"""How much darker the second shade is, of 255."""


def ground_pixels(ground: Ground, image_size: int) -> Ints:
    """(image_size, image_size, 3), colours 0..255."""
    samples = _SAMPLES * image_size
    units = ((2 * np.arange(samples) + 1) * SIDE // (2 * samples)).astype(np.int32)
    weight = _TEXTURES[ground.texture](units[None, :], units[:, None], ground.variant)
    weight = np.broadcast_to(weight, (samples, samples))
    mean = sum(weight[i::_SAMPLES, j::_SAMPLES] for i in range(_SAMPLES) for j in range(_SAMPLES))
    full = _FULL * _SAMPLES * _SAMPLES
    light = np.array(TONE_COLOURS[ground.tone], np.int32) + _CONTRAST // 2
    return light - (_CONTRAST * np.asarray(mean, np.int32)[:, :, None] + full // 2) // full


def _plain(x: Ints, y: Ints, variant: int) -> Ints:
    return np.full((1, 1), _FULL * (variant % 3) // 2, np.int32)


def _striped(x: Ints, y: Ints, variant: int) -> Ints:
    """Stripes across, down or slanting either way."""
    line = (x, y, x + y, x - y)[variant % 4]
    width = 72 + 8 * (variant // 4 % 4)
    return (line + variant // 16) // width % 2 * _FULL


def _checkered(x: Ints, y: Ints, variant: int) -> Ints:
    width = 96 + 8 * (variant % 4)
    return ((x + variant // 4) // width + (y + variant // 64) // width) % 2 * _FULL


def _dotted(x: Ints, y: Ints, variant: int) -> Ints:
    """Discs on a square grid."""
    period = 128 + 8 * (variant % 4)
    u = (x + variant // 4) % period - period // 2
    v = (y + variant // 64) % period - period // 2
    return np.where(u * u + v * v <= (period * 3 // 10) ** 2, np.int32(_FULL), np.int32(0))


def _shaded(x: Ints, y: Ints, variant: int) -> Ints:
    """From brighter than the first shade on one side to darker than the second on the other."""
    along = (x, y, (x + y) // 2, (x - y + SIDE) // 2)[variant // 2 % 4]
    weight = _FULL * (3 * along - SIDE) // SIDE
    return weight if variant % 2 else _FULL - weight


def _mottled(x: Ints, y: Ints, variant: int) -> Ints:
    """Soft blots: random weights on a lattice, interpolated along one axis and then along the other."""
    cell = 64
    lattice = _lattice(SIDE // cell + 1, variant)
    u, fx = x[0] // cell, x[0] % cell
    v, fy = y // cell, y % cell
    across = lattice[:, u] * (cell - fx) + lattice[:, u + 1] * fx
    blots: Ints = (across[v[:, 0]] * (cell - fy) + across[v[:, 0] + 1] * fy) // (cell * cell)
    return blots


def _lattice(points: int, variant: int) -> Ints:
    """(points, points), random-looking weights -128..383."""
    u = np.arange(points, dtype=np.int64)
    mixed = (u[None, :] * 73_856_093 ^ u[:, None] * 19_349_663 ^ variant * 83_492_791) & 0x7FFFFFFF
    mixed = (mixed ^ mixed >> 13) * 1_274_126_177 & 0x7FFFFFFF
    return ((mixed >> 15) % 512 - 128).astype(np.int32)


_TEXTURES: Mapping[str, Callable[[Ints, Ints, int], Ints]] = {
    "plain": _plain,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
    "shaded": _shaded,
    "mottled": _mottled,
}
