"""Pictures: decoding and resizing. Bytes in, uint8 RGB of one size out.

Axis letters: C channels, H height, W width.

Resizing is torch's antialiased bicubic on uint8, which agrees with Pillow's to one grey level and is measured 2 to 3
times faster.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from vlmoe_core.errors import DataError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""Raster formats. Pillow's others run programs (EPS), or are not met as photographs."""
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of that EXIF orientation upright."""


def whole_picture(image: bytes | Image.Image, size: int, max_pixels: int) -> NDArray[np.uint8]:
    """uint8 (3, size, size), RGB: all of an encoded or drawn picture, upright, its sides made equal.

    Raises:
        DataError: the picture can't be decoded, or declares more than `max_pixels`; the reason, without a name.
    """
    picture = as_picture(image, max_pixels)
    with complaints_as_data_errors():
        return resize(np.array(to_rgb(upright(picture))), size)


def as_picture(image: bytes | Image.Image, max_pixels: int) -> Image.Image:
    """A picture that may not be decoded yet. Raises DataError as `open_picture`."""
    return open_picture(image, max_pixels) if isinstance(image, bytes) else image


def upright(picture: Image.Image) -> Image.Image:
    """The decoded picture, turned as its EXIF block says."""
    turn = UPRIGHT.get(orientation_of(picture))
    picture.load()
    return picture if turn is None else picture.transpose(turn)


@contextmanager
def complaints_as_data_errors() -> Iterator[None]:
    """Pillow raises many kinds of errors on damaged bytes, and warns of what doesn't matter here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the picture is damaged or cut short ({error})") from error


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A picture of which only the header has been read.

    Raises DataError if the bytes are no picture, or declare more than `max_pixels` pixels.
    """
    try:
        with complaints_as_data_errors():
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, Image.DecompressionBombError):
            raise DataError(f"the picture declares too many pixels, max_pixels is {max_pixels} ({cause})") from error
        if isinstance(cause, UnidentifiedImageError):
            raise DataError(_what_else(data)) from error
        raise
    width, height = picture.size
    if width * height > max_pixels:
        raise DataError(f"the picture declares {width} x {height} pixels, more than max_pixels={max_pixels}")
    return picture


def _what_else(data: bytes) -> str:
    """A guess, for a message, at what some bytes are that Pillow does not know."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return "the picture is empty (0 bytes)"
    if data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")):
        return f"the picture's header is damaged or cut short ({len(data)} bytes)"
    if re.match(rb"(<\?xml.*?)?<svg", head, re.DOTALL):
        return "not a picture with pixels: looks like SVG; draw it to PNG first"
    if head.startswith((b"<!doctype html", b"<html")):
        return "not a picture: looks like HTML, the page of a failed download"
    if b"\0" not in head and head.isascii():
        return "not a picture: looks like text"
    return f"not a picture in a known format ({', '.join(FORMATS)})"


def orientation_of(picture: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is damaged."""
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        # A damaged EXIF block says nothing of the pixels; Pillow raises struct, syntax, key and other errors for it.
        return 1
    return value if value in UPRIGHT else 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB of any mode: 16-bit grey is scaled to 8 bits, transparency is laid on white."""
    if picture.mode == "F":
        raise DataError(
            "the picture holds floating point numbers, which have no known range; store it with 8 or 16 bits"
        )
    if picture.mode.startswith("I"):
        return _eight_bits(picture).convert("RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    values_HW = np.asarray(picture).astype(np.int64)
    if values_HW.min() < 0 or values_HW.max() > 65535:
        raise DataError("the picture's grey values are not within 0..65535; store it with 8 or 16 bits")
    return Image.fromarray(((values_HW + 128) // 257).astype(np.uint8))


def resize(pixels_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(3, size, size), bicubic, antialiased. The array must be writable: torch shares its memory, without writing."""
    pixels_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).unsqueeze(0)
    resized_1CHW = interpolate(pixels_1CHW, size=(size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized_1CHW[0].numpy())
