"""Pictures of one size: whole in evaluation, cropped and changed at random in training.

JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size (libjpeg's own scaling) in training, where the crop then still has
at least twice the wanted size.
"""

import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmoe_core.data.augment import Box, augmented, random_box
from vlmoe_core.data.config import AugmentConfig
from vlmoe_core.data.decoding import (
    as_picture,
    complaints_as_data_errors,
    orientation_of,
    resize,
    to_rgb,
    upright,
    whole_picture,
)

DRAFT_MARGIN = 2
"""A JPEG is never decoded so small that the crop has less than this many times the wanted size."""


class ImageTransform:
    """Makes one square picture of the wanted size: the whole of it, or a random crop, changed at random."""

    def __init__(self, size: int, augment: AugmentConfig | None, max_pixels: int) -> None:
        """Args: size in pixels a side; augment, or None for evaluation; max_pixels that a header may declare."""
        self.size = size
        self.augment = augment
        self.max_pixels = max_pixels

    def __call__(self, image: bytes | Image.Image, rng: random.Random) -> NDArray[np.uint8]:
        """uint8 (3, size, size), RGB, of an encoded or drawn picture.

        Raises:
            DataError: the picture can't be decoded, or declares more than `max_pixels`; the reason, without a name.
        """
        if self.augment is None:
            return whole_picture(image, self.size, self.max_pixels)
        picture = as_picture(image, self.max_pixels)
        with complaints_as_data_errors():
            return augmented(self._crop(picture, self.augment, rng), self.augment, rng)

    def _crop(self, picture: Image.Image, augment: AugmentConfig, rng: random.Random) -> NDArray[np.uint8]:
        """(3, size, size) of a random box."""
        width, height = picture.size[::-1] if orientation_of(picture) >= 5 else picture.size
        box = crop_box(width, height, augment, rng)
        shrink_while_decoding(picture, box, self.size)
        turned = upright(picture)
        box = _scaled(box, width, height, turned.size)
        cropped = turned if box == (0, 0, *turned.size) else turned.crop(box)
        return resize(np.array(to_rgb(cropped)), self.size)


def crop_box(width: int, height: int, augment: AugmentConfig, rng: random.Random) -> Box:
    """Where a random resized crop lies (Szegedy et al., arXiv 1409.4842, section 6; as in BEiT).

    The share of the area is uniform, the ratio of the sides log-uniform. Where no draw fits into the picture: its
    largest centred part whose ratio is allowed.
    """
    if augment.crop_scale == (1.0, 1.0):
        return 0, 0, width, height
    box = random_box(width, height, augment.crop_scale, augment.crop_ratio, rng)
    if box is not None:
        return box
    low, high = augment.crop_ratio
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def shrink_while_decoding(picture: Image.Image, box: Box, size: int) -> None:
    """Let libjpeg decode a JPEG at 1/2, 1/4 or 1/8 where the crop then still has DRAFT_MARGIN x size pixels a side."""
    if picture.format not in ("JPEG", "MPO"):
        return
    share = DRAFT_MARGIN * size / min(box[2] - box[0], box[3] - box[1])
    if share <= 1:
        # Pillow takes the largest scale that leaves the picture at least this large.
        picture.draft(None, (math.ceil(picture.width * share), math.ceil(picture.height * share)))


def _scaled(box: Box, width: int, height: int, decoded: tuple[int, int]) -> Box:
    """The box in a picture that was decoded smaller, rounded outwards."""
    x, y = decoded[0] / width, decoded[1] / height
    return math.floor(box[0] * x), math.floor(box[1] * y), math.ceil(box[2] * x), math.ceil(box[3] * y)
