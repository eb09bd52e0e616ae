"""Turns a scene into pixels with whole numbers only, so that every machine, numpy and Pillow gives the same bytes.

Every pixel is the mean of a small grid of samples. Axis letters: H height, W width, C channels.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from vlmoe_core.data.scenes.ground import ground_pixels
from vlmoe_core.data.scenes.shapes import INSIDE, Ints, Mask
from vlmoe_core.data.scenes.world import SIDE, Scene, SceneObject

SAMPLES = 4
"""Samples along each side of a pixel of an object."""

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (250, 138, 20),
    "yellow": (252, 222, 40),
    "green": (38, 150, 62),
    "blue": (30, 84, 214),
    "purple": (122, 44, 166),
    "pink": (252, 132, 190),
    "brown": (122, 74, 36),
    "black": (22, 22, 24),
    "white": (252, 252, 252),
}


def draw(scene: Scene, image_size: int) -> Image.Image:
    """The scene as an RGB image of image_size x image_size pixels."""
    canvas_HWC = ground_pixels(scene.ground, image_size)
    for thing in scene.objects:
        _paint(canvas_HWC, thing, image_size)
    return Image.fromarray(canvas_HWC.astype(np.uint8))


def object_mask(thing: SceneObject, image_size: int) -> Mask:
    """(SAMPLES * image_size, the same), True at the samples that the object covers, hidden ones included."""
    left, top, right, bottom = pixel_box(thing, image_size)
    mask = np.zeros((SAMPLES * image_size, SAMPLES * image_size), np.bool_)
    mask[SAMPLES * top : SAMPLES * bottom, SAMPLES * left : SAMPLES * right] = _patch_mask(thing, image_size)
    return mask


def pixel_box(thing: SceneObject, image_size: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels that the object touches; right and bottom lie just outside."""
    left, top, right, bottom = thing.box
    return (
        left * image_size // SIDE,
        top * image_size // SIDE,
        -(-right * image_size // SIDE),
        -(-bottom * image_size // SIDE),
    )


def _patch_mask(thing: SceneObject, image_size: int) -> Mask:
    left, top, right, bottom = pixel_box(thing, image_size)
    x, y = thing.centre
    return INSIDE[thing.shape](
        _local(left, right, x, thing.radius, image_size)[None, :],
        _local(top, bottom, y, thing.radius, image_size)[:, None],
    )


def _local(start: int, stop: int, centre: int, radius: int, image_size: int) -> Ints:
    """Samples of pixels start..stop-1 along one axis, in thousandths of the radius from the centre."""
    scale = 2 * SAMPLES * image_size
    points = (2 * np.arange(SAMPLES * start, SAMPLES * stop, dtype=np.int64) + 1) * SIDE
    return ((points - centre * scale) * 1000 // (radius * scale)).astype(np.int32)


def _paint(canvas_HWC: Ints, thing: SceneObject, image_size: int) -> None:
    """Blend one object, with a rim of another shade, into the canvas in place."""
    left, top, right, bottom = pixel_box(thing, image_size)
    mask = _patch_mask(thing, image_size)
    whole = _coverage(mask)
    inner = _coverage(_eroded(mask, max(1, SAMPLES * image_size // 72)))
    colour = np.array(PALETTE[thing.colour], np.int32)
    patch = canvas_HWC[top:bottom, left:right]
    full = SAMPLES * SAMPLES
    blend = patch * (full - whole) + _rim(colour) * (whole - inner) + colour * inner
    canvas_HWC[top:bottom, left:right] = (blend + full // 2) // full


def _rim(colour: Ints) -> Ints:
    """A darker shade of the colour, or a lighter one where it is nearly black."""
    return colour * 11 // 20 if int(colour.max()) > 60 else colour + 72


def _eroded(mask: Mask, width: int) -> Mask:
    """The samples from which a step of `width` in any of eight directions stays inside."""
    height, length = mask.shape
    padded = np.zeros((height + 2 * width, length + 2 * width), np.bool_)
    padded[width:-width, width:-width] = mask
    slant = width * 7 // 10
    steps = [(width, 0), (-width, 0), (0, width), (0, -width)]
    steps += [(a, b) for a in (slant, -slant) for b in (slant, -slant)]
    inner = mask.copy()
    for down, along in steps:
        inner &= padded[width + down : width + down + height, width + along : width + along + length]
    return inner


def _coverage(mask: Mask) -> Ints:
    """(height, width, 1), how many of its samples each pixel has inside."""
    counts = mask.view(np.uint8)
    rows = sum(counts[i::SAMPLES] for i in range(SAMPLES))
    both = sum(np.asarray(rows)[:, i::SAMPLES] for i in range(SAMPLES))
    return np.asarray(both, np.int32)[:, :, None]
