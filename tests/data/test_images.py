import io
import pickle
import random

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin

from vlmoe_core.data.config import AugmentConfig
from vlmoe_core.data.images import ImageTransform, crop_box
from vlmoe_core.errors import DataError

LIMIT = 10_000_000
WHOLE = AugmentConfig()


def evaluate(image, size=32):
    return ImageTransform(size, None, LIMIT)(image, random.Random(0))


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def drafts(monkeypatch):
    """Sizes of the pictures that were decoded in draft mode."""
    sizes = []
    original = JpegImagePlugin.JpegImageFile.draft

    def spy(self, mode, size):
        result = original(self, mode, size)
        sizes.append(self.size)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    return sizes


@pytest.mark.parametrize("size", [(100, 75), (31, 64), (500, 20), (1, 1), (32, 32)])
def test_evaluation_is_pillows_bicubic_of_the_whole_picture(size):
    picture = photograph(*size)
    ours = evaluate(encoded(picture))
    theirs = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert ours.shape == (3, 32, 32) and ours.dtype == np.uint8 and ours.flags.c_contiguous
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_drawn_picture_equals_its_png():
    picture = photograph(50, 40)
    assert np.array_equal(evaluate(picture), evaluate(encoded(picture)))


def test_training_is_a_function_of_the_generator():
    augment = AugmentConfig(crop_scale=(0.2, 1.0), horizontal_flip=0.5, color_jitter=0.4)
    transform = pickle.loads(pickle.dumps(ImageTransform(32, augment, LIMIT)))
    data = encoded(photograph(120, 90), "JPEG")
    draws = [transform(data, random.Random(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (3, 32, 32) and draws[0].dtype == np.uint8
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_training_without_augmentation_takes_the_whole_picture():
    data = encoded(photograph(60, 45))
    assert np.array_equal(ImageTransform(32, WHOLE, LIMIT)(data, random.Random(0)), evaluate(data))


def test_the_flip_mirrors():
    data = encoded(photograph(60, 45))
    flipped = ImageTransform(32, AugmentConfig(horizontal_flip=1.0), LIMIT)(data, random.Random(0))
    assert np.array_equal(flipped[:, :, ::-1], evaluate(data))


def test_colour_jitter_stays_within_its_factors():
    grey = Image.new("RGB", (40, 40), (100, 100, 100))
    transform = ImageTransform(32, AugmentConfig(color_jitter=0.4), LIMIT)
    means = [transform(grey, random.Random(seed)).mean() for seed in range(40)]
    # Contrast and saturation leave an even grey as it is: only brightness moves it.
    assert 58 <= min(means) < 75 and 125 < max(means) <= 141


def test_crops_have_the_area_and_ratio_that_was_asked_for():
    augment = AugmentConfig(crop_scale=(0.2, 0.5), crop_ratio=(0.8, 1.25))
    shares, ratios = [], []
    for seed in range(300):
        left, upper, right, lower = crop_box(400, 300, augment, random.Random(seed))
        assert 0 <= left < right <= 400 and 0 <= upper < lower <= 300
        shares.append((right - left) * (lower - upper) / 120_000)
        ratios.append((right - left) / (lower - upper))
    assert 0.19 < min(shares) < 0.23 and 0.47 < max(shares) < 0.51
    assert 0.78 < min(ratios) < 0.84 and 1.2 < max(ratios) < 1.27


def test_a_crop_that_never_fits_is_the_middle():
    assert crop_box(2000, 1, AugmentConfig(crop_scale=(0.5, 1.0)), random.Random(0)) == (999, 0, 1000, 1)


def test_draft_mode_changes_pixels_little(drafts):
    data = encoded(photograph(512, 400), "JPEG", quality=90)
    drafted = ImageTransform(64, WHOLE, LIMIT)(data, random.Random(0))
    assert drafts == [(256, 200)]
    difference = np.abs(drafted.astype(int) - evaluate(data, 64))
    assert difference.max() <= 8 and difference.mean() < 1


def test_draft_mode_keeps_twice_the_target(drafts):
    data = encoded(photograph(1000, 760), "JPEG")
    augment = AugmentConfig(crop_scale=(0.1, 1.0))
    for seed in range(60):
        box = crop_box(1000, 760, augment, random.Random(seed))
        drafts.clear()
        ImageTransform(64, augment, LIMIT)(data, random.Random(seed))
        scale = 1000 / drafts[-1][0] if drafts else 1
        side = min(box[2] - box[0], box[3] - box[1])
        assert side / scale >= 128 or scale == 1
        assert side / (2 * scale) < 128 or scale == 8


def test_draft_mode_is_never_used_in_evaluation(drafts):
    evaluate(encoded(photograph(1024, 1024), "JPEG"))
    assert drafts == []


@pytest.mark.parametrize("augment", [None, WHOLE])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation, augment):
    upright = photograph(400, 300)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    pixels = ImageTransform(32, augment, LIMIT)(data, random.Random(0))
    assert np.abs(pixels.astype(int) - evaluate(upright)).mean() < 2


def test_sixteen_bit_grey_is_scaled():
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = evaluate(encoded(Image.fromarray(values)), 64)
    assert np.array_equal(pixels[0], np.round(values / 257).astype(np.uint8))
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    picture = Image.new(mode, (8, 8), 0 if mode != "CMYK" else (0, 0, 0, 255))
    assert evaluate(picture).shape == (3, 32, 32)


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert evaluate(encoded(half))[:, 4, 4].tolist() == [255, 127, 127]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert evaluate(encoded(palette, transparency=0)).min() == 255
    keyed = encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))
    assert evaluate(keyed).min() == 255


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    for kind in ("GIF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert evaluate(data)[:, 4, 4].tolist() == [255, 0, 0]


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    data = encoded(Image.new("1", (400, 300)))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"400 x 300 pixels, more than max_pixels=119999"):
        ImageTransform(32, None, 119_999)(data, random.Random(0))


def test_floating_point_pixels_are_refused():
    with pytest.raises(DataError, match="floating point"):
        evaluate(encoded(Image.new("F", (8, 8), 0.5), "TIFF"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "looks like HTML"),
        (b'<?xml version="1.0"?>\n<svg></svg>', "looks like SVG"),
        (b"just words", "looks like text"),
        (bytes(range(256)), "known format"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "cut short"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "looks like text"),
    ],
)
def test_what_is_no_picture_is_named(data, reason):
    with pytest.raises(DataError, match=reason):
        evaluate(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_cut_files_are_refused(kind):
    data = encoded(photograph(64, 48), kind)
    for share in (0.02, 0.3, 0.6):
        with pytest.raises(DataError):
            evaluate(data[: int(len(data) * share)])
