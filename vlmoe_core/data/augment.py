"""Random changes of a training picture that has its final size: mirroring, RandAugment, colour jitter, erasing.

The order is that of VLMo, BEiT-3 and timm: crop, flip, RandAugment, colour jitter, random erasing. All choices come
from one `random.Random`. RandAugment, jitter and erasing draw nothing from it where they are switched off.

Axis letters: C channels, H height, W width.
"""

import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from vlmoe_core.data.config import MAX_MAGNITUDE, AugmentConfig, OpName, RandAugmentConfig, Severity

BOX_ATTEMPTS = 10
GREY = (128, 128, 128)
"""Fills what a turned, sheared or moved picture leaves empty, as in VLMo and timm."""
ERASED_SHARE = (0.02, 1 / 3)
"""Range of the erased share of the area."""
ERASED_RATIO = (0.3, 1 / 0.3)
"""Range of the erased rectangle's width over height."""

Box = tuple[int, int, int, int]
"""left, upper, right, lower in pixels of the upright picture."""


def augmented(pixels_CHW: NDArray[np.uint8], augment: AugmentConfig, rng: random.Random) -> NDArray[np.uint8]:
    """The cropped and resized picture after all other changes; uint8 (3, H, W) like the given one."""
    if rng.random() < augment.horizontal_flip:
        pixels_CHW = np.ascontiguousarray(pixels_CHW[:, :, ::-1])
    if augment.rand_augment is not None or augment.color_jitter > 0:
        picture = Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))
        if augment.rand_augment is not None:
            picture = rand_augment(picture, augment.rand_augment, rng)
        if augment.color_jitter > 0:
            picture = color_jitter(picture, augment.color_jitter, rng)
        pixels_CHW = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
    if augment.random_erasing > 0 and rng.random() < augment.random_erasing:
        pixels_CHW = erased(pixels_CHW, rng)
    return pixels_CHW


def rand_augment(picture: Image.Image, config: RandAugmentConfig, rng: random.Random) -> Image.Image:
    """An RGB picture after `num_ops` ops, drawn with replacement (Cubuk et al., arXiv 1909.13719).

    As in VLMo and timm, each drawn op is left out with probability 1 - `probability`, and goes either way.
    """
    for name in rng.choices(config.ops, k=config.num_ops):
        if rng.random() < config.probability:
            magnitude = min(MAX_MAGNITUDE, max(0.0, rng.gauss(config.magnitude, config.magnitude_std)))
            sign = 1 if rng.random() < 0.5 else -1
            picture = apply_op(name, picture, sign * magnitude / MAX_MAGNITUDE, config.severity)
    return picture


def apply_op(name: OpName, picture: Image.Image, strength: float, severity: Severity) -> Image.Image:
    """An RGB picture after one op.

    Args: strength from -1 to 1, the magnitude over 10 with a sign, which ops without a direction ignore.
    Shears keep the upper left corner, rotation keeps the centre. Ranges of the magnitude: `RandAugmentConfig.severity`.
    """
    match name:
        case "Identity":
            return picture
        case "AutoContrast":
            return ImageOps.autocontrast(picture)
        case "Equalize":
            return ImageOps.equalize(picture)
        case "Brightness":
            return ImageEnhance.Brightness(picture).enhance(_factor(strength, severity))
        case "Color":
            return ImageEnhance.Color(picture).enhance(_factor(strength, severity))
        case "Contrast":
            return ImageEnhance.Contrast(picture).enhance(_factor(strength, severity))
        case "Sharpness":
            return ImageEnhance.Sharpness(picture).enhance(_factor(strength, severity))
        case "Posterize":
            # At least one bit: none would leave a black picture.
            return ImageOps.posterize(picture, max(1, 4 - int(4 * abs(strength))))
        case "Solarize":
            return ImageOps.solarize(picture, 256 - int(256 * abs(strength)))
        case "Rotate":
            return picture.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=GREY)
        case "ShearX":
            return _sheared(picture, 0.3 * strength, 0)
        case "ShearY":
            return _sheared(picture, 0, 0.3 * strength)
        case "TranslateX":
            return _moved(picture, _shift(strength, picture.width, severity), 0)
        case "TranslateY":
            return _moved(picture, 0, _shift(strength, picture.height, severity))


def _factor(strength: float, severity: Severity) -> float:
    return 0.1 + 1.8 * abs(strength) if severity == "vlmo" else 1 + 0.9 * strength


def _shift(strength: float, side: int, severity: Severity) -> int:
    """Whole pixels, which keep the picture as sharp as it was."""
    return round(strength * (10 if severity == "vlmo" else 0.45 * side))


def _moved(picture: Image.Image, x: int, y: int) -> Image.Image:
    canvas = Image.new("RGB", picture.size, GREY)
    canvas.paste(picture, (x, y))
    return canvas


def _sheared(picture: Image.Image, x: float, y: float) -> Image.Image:
    matrix = (1, x, 0, y, 1, 0)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def color_jitter(picture: Image.Image, width: float, rng: random.Random) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each times a factor from (1 - width, 1 + width).

    BEiT jitters before it crops; after it, the same changes cost a fraction.
    """
    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    rng.shuffle(changes)
    for change in changes:
        picture = change(picture).enhance(rng.uniform(1 - width, 1 + width))
    return picture


def erased(pixels_CHW: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    """A copy with one rectangle of uniformly random pixels (random erasing, Zhong et al., arXiv 1708.04896).

    Its share of the area is uniform in `ERASED_SHARE`, its ratio log-uniform in `ERASED_RATIO`. Unchanged where no draw
    fits into the picture.
    """
    _, height, width = pixels_CHW.shape
    box = random_box(width, height, ERASED_SHARE, ERASED_RATIO, rng)
    if box is None:
        return pixels_CHW
    left, upper, right, lower = box
    shape = (len(pixels_CHW), lower - upper, right - left)
    noise = np.frombuffer(rng.randbytes(math.prod(shape)), np.uint8)
    changed_CHW = pixels_CHW.copy()
    changed_CHW[:, upper:lower, left:right] = noise.reshape(shape)
    return changed_CHW


def random_box(
    width: int, height: int, shares: tuple[float, float], ratios: tuple[float, float], rng: random.Random
) -> Box | None:
    """A box with a uniform share of the area, a log-uniform ratio of width over height, anywhere in the picture.

    None where `BOX_ATTEMPTS` draws don't fit.
    """
    for _ in range(BOX_ATTEMPTS):
        area = width * height * rng.uniform(*shares)
        ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h
    return None
