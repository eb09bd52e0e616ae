"""RandAugment and random erasing: each op against a formula in numpy, and how often and how far they go."""

import math
import random
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import ValidationError

from vlmoe_core.data import augment as module
from vlmoe_core.data.augment import apply_op, augmented, erased, rand_augment, random_box
from vlmoe_core.data.config import AugmentConfig, OpName, RandAugmentConfig
from vlmoe_core.data.images import ImageTransform

OPS: tuple[OpName, ...] = get_args(OpName)
ENHANCING: tuple[OpName, ...] = ("Brightness", "Color", "Contrast", "Sharpness")
MOVING: tuple[OpName, ...] = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
GREY = 128

Pixels = NDArray[np.uint8]


def noise(height: int = 32, width: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(20, 220, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def after(name: OpName, strength: float, severity: Any = "vlmo", picture: Image.Image | None = None) -> Pixels:
    return np.asarray(apply_op(name, picture or noise(), strength, severity))


def luma(pixels_HWC: Pixels) -> NDArray[np.int64]:
    """ITU-R 601 grey as Pillow rounds it."""
    return (pixels_HWC.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16


def smoothed(pixels_HWC: Pixels) -> NDArray[np.float64]:
    """Weights 1, with 5 in the middle, over 13; the border stays."""
    padded = np.pad(pixels_HWC.astype(float), ((1, 1), (1, 1), (0, 0)))
    height, width = pixels_HWC.shape[:2]
    total = 4.0 * pixels_HWC + sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    smooth = pixels_HWC.astype(float)
    smooth[1:-1, 1:-1] = np.floor(total / 13 + 0.5)[1:-1, 1:-1]
    return smooth


def dull(name: OpName, pixels: Pixels) -> Any:
    """What an enhancement by 0 gives."""
    return {
        "Brightness": np.zeros(pixels.shape),
        "Color": luma(pixels)[:, :, None],
        "Contrast": math.floor(luma(pixels).mean() + 0.5),
        "Sharpness": smoothed(pixels),
    }[name]


@pytest.mark.parametrize("name", ENHANCING)
@pytest.mark.parametrize(
    ("severity", "strength", "factor"),
    [
        ("vlmo", 0.7, 1.36),
        ("vlmo", -0.7, 1.36),
        ("vlmo", 0.0, 0.1),
        ("vlmo", 1.0, 1.9),
        ("increasing", 0.9, 1.81),
        ("increasing", -0.9, 0.19),
        ("increasing", -0.3, 0.73),
    ],
)
def test_enhancements_blend_with_the_dull_picture(name: OpName, severity: str, strength: float, factor: float) -> None:
    pixels = np.asarray(noise())
    base = dull(name, pixels)
    wanted = np.clip(base + factor * (pixels.astype(float) - base), 0, 255)
    found = after(name, strength, severity)
    assert np.abs(found - wanted).max() <= 1
    assert not np.array_equal(found, pixels)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("severity", "strength", "side", "pixels"),
    [("vlmo", 0.7, 32, 7), ("vlmo", 1.0, 32, 10), ("increasing", 0.9, 40, 16), ("increasing", 1.0, 40, 18)],
)
def test_translation_moves_by_whole_pixels(severity: str, strength: float, side: int, pixels: int, sign: int) -> None:
    square = noise(side, side)
    before = np.asarray(square)
    wanted = np.full_like(before, GREY)
    if sign < 0:
        wanted[:, : side - pixels] = before[:, pixels:]
    else:
        wanted[:, pixels:] = before[:, : side - pixels]
    assert np.array_equal(after("TranslateX", sign * strength, severity, square), wanted)
    turned = after("TranslateY", sign * strength, severity, square.transpose(Image.Transpose.TRANSPOSE))
    assert np.array_equal(turned.transpose(1, 0, 2), wanted)


def linear(row: Pixels, x: float) -> NDArray[np.float64] | None:
    """Linear interpolation at x pixels from the left edge, clamped to the middles of the outer pixels."""
    if not 0 <= x < len(row):
        return None
    x = min(max(x - 0.5, 0), len(row) - 1)
    low = min(int(x), len(row) - 2)
    mixed: NDArray[np.float64] = row[low] * (low + 1 - x) + row[low + 1] * (x - low)
    return mixed


@pytest.mark.parametrize("strength", [0.7, -0.7, 1.0])
def test_shears_slide_each_line_by_its_distance_from_the_upper_left(strength: float) -> None:
    picture = noise()
    before, found = np.asarray(picture), after("ShearX", strength)
    for y, line in enumerate(found):
        for x, pixel in enumerate(line):
            wanted = linear(before[y], x + 0.5 + 0.3 * strength * (y + 0.5))
            assert np.abs(pixel - (GREY if wanted is None else wanted)).max() <= 1
    turned = after("ShearY", strength, picture=picture.transpose(Image.Transpose.TRANSPOSE))
    assert np.array_equal(turned.transpose(1, 0, 2), found)


def test_rotation_turns_about_the_middle_by_30_degrees_at_most() -> None:
    white = np.zeros((101, 101, 3), np.uint8)
    white[48:53, 88:93] = 255
    for strength, degrees in [(1.0, 30), (-0.7, -21), (0.1, 3)]:
        found = after("Rotate", strength, picture=Image.fromarray(white))[:, :, 0]
        bright_y, bright_x = np.nonzero(found > 200)
        # Counter-clockwise, 40 pixels from the middle.
        assert abs(bright_x.mean() - 50 - 40 * math.cos(math.radians(degrees))) < 0.5
        assert abs(50 - bright_y.mean() - 40 * math.sin(math.radians(degrees))) < 0.5
    assert after("Rotate", 1.0)[0, 0].tolist() == [GREY] * 3


@pytest.mark.parametrize("name", MOVING)
def test_what_becomes_empty_is_mid_grey_and_the_rest_is_kept(name: OpName) -> None:
    picture = Image.new("RGB", (32, 32), (200, 10, 60))
    for severity in ("vlmo", "increasing"):
        colours = {tuple(pixel) for pixel in after(name, 0.9, severity, picture).reshape(-1, 3).tolist()}
        assert colours == {(200, 10, 60), (GREY, GREY, GREY)}


def test_autocontrast_and_equalize() -> None:
    pixels = np.asarray(noise()).astype(float)
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    assert np.abs(after("AutoContrast", 0.7) - (pixels - low) * 255 / (high - low)).max() <= 1
    assert np.array_equal(after("AutoContrast", 0.7), np.asarray(ImageOps.autocontrast(noise())))
    assert np.array_equal(after("Equalize", -0.7), np.asarray(ImageOps.equalize(noise())))
    # Afterwards each quarter of the grey levels holds a quarter of the pixels.
    shares = np.histogram(after("Equalize", 0.7, picture=noise(200, 200))[:, :, 0], bins=4, range=(0, 256))[0] / 200**2
    assert np.abs(shares - 0.25).max() < 0.03


@pytest.mark.parametrize(("strength", "bits"), [(0.0, 4), (0.2, 4), (0.7, 2), (-0.9, 1), (1.0, 1)])
def test_posterize_keeps_the_highest_bits(strength: float, bits: int) -> None:
    step = 2 ** (8 - bits)
    assert np.array_equal(after("Posterize", strength), np.asarray(noise()) // step * step)


@pytest.mark.parametrize(("strength", "threshold"), [(0.0, 256), (0.5, 128), (-0.7, 77), (1.0, 0)])
def test_solarize_inverts_what_is_bright(strength: float, threshold: int) -> None:
    pixels = np.asarray(noise())
    assert np.array_equal(after("Solarize", strength), np.where(pixels < threshold, pixels, 255 - pixels))


@pytest.mark.parametrize("name", ["Identity", "Solarize", *MOVING, *ENHANCING])
def test_magnitude_0_changes_nothing(name: OpName) -> None:
    assert np.array_equal(after(name, 0.0, "increasing"), np.asarray(noise()))


@pytest.mark.parametrize("name", ENHANCING)
def test_vlmos_enhancements_change_nothing_at_magnitude_5(name: OpName) -> None:
    assert np.array_equal(after(name, 0.5), np.asarray(noise()))


@pytest.mark.parametrize("severity", ["vlmo", "increasing"])
@pytest.mark.parametrize("name", OPS)
def test_every_op_keeps_size_and_mode(name: OpName, severity: str) -> None:
    for strength in (-1.0, -0.35, 0.7, 1.0):
        found = after(name, strength, severity)
        assert found.shape == (32, 40, 3) and found.dtype == np.uint8


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Name and strength of the ops that RandAugment applied."""
    calls: list[tuple[str, float]] = []

    def spy(name: str, picture: Image.Image, strength: float, severity: str) -> Image.Image:
        calls.append((name, strength))
        return picture

    monkeypatch.setattr(module, "apply_op", spy)
    return calls


def test_the_defaults_are_vlmos() -> None:
    config = RandAugmentConfig()
    assert (config.num_ops, config.magnitude, config.magnitude_std, config.probability) == (2, 7, 0, 0.5)
    assert config.severity == "vlmo"
    assert set(config.ops) == {
        "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX",
        "TranslateY", "Rotate",
    }  # fmt: skip


def test_ops_signs_and_numbers_of_ops_are_as_probable_as_said(applied: list[tuple[str, float]]) -> None:
    rng, numbers, draws = random.Random(0), Counter[int](), 8000
    for _ in range(draws):
        before = len(applied)
        rand_augment(noise(2, 2), RandAugmentConfig(), rng)
        numbers[len(applied) - before] += 1
    # Two ops, each with p = 1/2. The bounds are 5 standard deviations.
    for number, share in [(0, 0.25), (1, 0.5), (2, 0.25)]:
        assert abs(numbers[number] / draws - share) < 5 * math.sqrt(share * (1 - share) / draws)
    names = Counter(name for name, _ in applied)
    assert set(names) == set(RandAugmentConfig().ops)
    for count in names.values():
        assert abs(count / len(applied) - 0.1) < 5 * math.sqrt(0.09 / len(applied))
    assert {abs(strength) for _, strength in applied} == {0.7}
    positive = sum(strength > 0 for _, strength in applied) / len(applied)
    assert abs(positive - 0.5) < 5 * 0.5 / math.sqrt(len(applied))


@pytest.mark.parametrize(("probability", "number"), [(0.0, 0), (1.0, 3)])
def test_certain_probabilities(applied: list[tuple[str, float]], probability: float, number: int) -> None:
    for seed in range(20):
        applied.clear()
        rand_augment(noise(), RandAugmentConfig(num_ops=3, probability=probability), random.Random(seed))
        assert len(applied) == number


def test_the_magnitude_varies_and_stays_below_10(applied: list[tuple[str, float]]) -> None:
    rng, config = random.Random(0), RandAugmentConfig(magnitude=9, magnitude_std=0.5, num_ops=1, probability=1)
    for _ in range(4000):
        rand_augment(noise(2, 2), config, rng)
    magnitudes = np.array([10 * abs(strength) for _, strength in applied])
    assert magnitudes.max() == 10
    # A normal distribution of mean 9 and deviation 0.5: 2.3 % lie above 10, 15.9 % below 8.5.
    assert 0.013 < (magnitudes == 10).mean() < 0.033
    assert 0.13 < (magnitudes < 8.5).mean() < 0.19
    assert abs(np.median(magnitudes) - 9) < 0.05


def test_rand_augment_applies_the_op_that_was_drawn() -> None:
    config = RandAugmentConfig(ops=("TranslateX",), num_ops=2, probability=1)
    found = {rand_augment(noise(), config, random.Random(seed)).tobytes() for seed in range(30)}
    picture = noise()
    moves = [(left, right) for left in (0.7, -0.7) for right in (0.7, -0.7)]
    wanted = {apply_op("TranslateX", apply_op("TranslateX", picture, a, "vlmo"), b, "vlmo").tobytes() for a, b in moves}
    assert found == wanted and len(found) == 3 + 1


def boxes(draws: int) -> list[tuple[int, int, int, int]]:
    rng = random.Random(0)
    found = [random_box(400, 300, module.ERASED_SHARE, module.ERASED_RATIO, rng) for _ in range(draws)]
    return [box for box in found if box is not None]


def test_erased_boxes_have_the_published_area_and_ratio() -> None:
    found = np.array(boxes(3000))
    assert len(found) == 3000
    left, upper, right, lower = found.T
    assert left.min() == 0 and right.max() == 400 and upper.min() == 0 and lower.max() == 300
    shares, ratios = (right - left) * (lower - upper) / 120_000, (right - left) / (lower - upper)
    assert 0.0195 < shares.min() < 0.022 and 0.32 < shares.max() < 0.336
    assert 0.29 < ratios.min() < 0.32 and 3.1 < ratios.max() < 3.4
    # Uniform shares, log-uniform ratios; a few large and wide ones are drawn again.
    assert 0.15 < np.median(shares) < 0.18 and 0.85 < np.median(ratios) < 1.18


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_erasing_changes_one_box_of_a_copy(height: int, width: int, seed: int) -> None:
    before = np.full((3, height, width), 77, np.uint8)
    after = erased(before, random.Random(seed))
    assert after.shape == before.shape and after.dtype == np.uint8 and (before == 77).all()
    box = random_box(width, height, module.ERASED_SHARE, module.ERASED_RATIO, random.Random(seed))
    outside = np.ones((height, width), bool)
    if box is not None:
        outside[box[1] : box[3], box[0] : box[2]] = False
    assert (after[:, outside] == 77).all()
    assert box is None or (after[:, ~outside] != 77).mean() > 0.5


def test_erased_pixels_are_uniform() -> None:
    before = np.zeros((3, 224, 224), np.uint8)
    values = np.concatenate([pixels[pixels > 0] for pixels in (erased(before, random.Random(s)) for s in range(30))])
    shares = np.histogram(values, bins=5, range=(1, 256))[0] / len(values)
    assert np.abs(shares - 0.2).max() < 0.005
    assert np.abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_erasing_is_as_probable_as_said() -> None:
    rng, before = random.Random(0), np.full((3, 16, 16), 77, np.uint8)
    config = AugmentConfig(random_erasing=0.25)
    changed = sum(not np.array_equal(augmented(before, config, rng), before) for _ in range(4000))
    assert abs(changed / 4000 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    always = AugmentConfig(random_erasing=1.0)
    assert all(not np.array_equal(augmented(before, always, random.Random(s)), before) for s in range(50))


def test_everything_is_a_function_of_the_generator() -> None:
    config = AugmentConfig(
        crop_scale=(0.5, 1.0),
        horizontal_flip=0.5,
        color_jitter=0.4,
        rand_augment=RandAugmentConfig(ops=OPS, magnitude=9, magnitude_std=0.5, severity="increasing"),
        random_erasing=0.25,
    )
    transform = ImageTransform(24, config, 10_000)
    first = [transform(noise(), random.Random(seed)) for seed in range(60)]
    random.seed(5)
    np.random.seed(5)
    second = [transform(noise(), random.Random(seed)) for seed in range(60)]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a.shape == (3, 24, 24) and a.dtype == np.uint8 and a.flags.c_contiguous for a in first)
    assert len({a.tobytes() for a in first}) == 60


def test_flip_comes_first_and_erasing_last() -> None:
    before = np.ascontiguousarray(np.asarray(noise()).transpose(2, 0, 1))
    config = AugmentConfig(
        horizontal_flip=1.0,
        rand_augment=RandAugmentConfig(ops=("ShearX",), num_ops=1, probability=1),
        random_erasing=1.0,
    )
    rng = random.Random(3)
    rng.random()
    mirrored = Image.fromarray(np.asarray(noise())[:, ::-1].copy())
    sheared = np.asarray(rand_augment(mirrored, config.rand_augment or RandAugmentConfig(), rng))
    rng.random()
    wanted = erased(sheared.transpose(2, 0, 1), rng)
    assert np.array_equal(augmented(before, config, random.Random(3)), wanted)


def test_what_is_switched_off_draws_nothing() -> None:
    # A draw more would move every mask and crop of the runs of before.
    before, rng, expected = np.zeros((3, 8, 8), np.uint8), random.Random(9), random.Random(9)
    augmented(before, AugmentConfig(), rng)
    expected.random()
    assert rng.getstate() == expected.getstate()
    augmented(before, AugmentConfig(color_jitter=0.4), rng)
    expected.random()
    expected.shuffle([0, 1, 2])
    for _ in range(3):
        expected.uniform(0, 1)
    assert rng.getstate() == expected.getstate()


@pytest.mark.parametrize(
    "fields",
    [
        {"ops": ["Invert"]},
        {"ops": []},
        {"num_ops": 0},
        {"magnitude": 10.5},
        {"magnitude_std": -1},
        {"probability": 1.5},
        {"severity": "timm"},
    ],
)
def test_what_is_out_of_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        AugmentConfig.model_validate({"rand_augment": fields})
