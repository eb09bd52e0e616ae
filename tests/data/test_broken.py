"""Every file of ../shared/data/broken, and what must come of it: see the README there for what is wrong with each."""

import random
import re

import pytest
from PIL import ImageFile

from tests.data.files_support import SHARED, files_below, needs_shared, open_source
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.errors import DataError

BROKEN = SHARED / "broken"
MAX_PIXELS = 178_956_970
pytestmark = needs_shared

PICTURES = {
    "1x1.jpg": "ok",
    "1x1.png": "ok",
    "2000x1.png": "ok",
    "alpha.png": "ok",
    "animated.gif": "ok",
    "bad-crc.png": "header is damaged",
    "bomb-declared.png": "too many pixels",
    "bomb-real.png": "too many pixels",
    "cmyk.jpg": "ok",
    # libjpeg bridges the damage: nothing in the file says that the pixels are wrong.
    "corrupt-middle.jpg": "ok",
    "exif-corrupt.jpg": "ok",
    "exif-orientation-3.jpg": "ok",
    "exif-orientation-6.jpg": "ok",
    "exif-orientation-8.jpg": "ok",
    "good.jpg": "ok",
    "good.png": "ok",
    "gray.jpg": "ok",
    "gray16.png": "ok",
    "html.jpg": "looks like HTML",
    "large-120mp.png": "ok",
    "palette-transparent.png": "ok",
    "png-named.jpg": "ok",
    "rgb16.png": "ok",
    "text.jpg": "looks like text",
    "truncated-header.jpg": "cut short",
    "truncated.jpg": "cut short",
    "truncated.png": "cut short",
    "unsupported.svg": "looks like SVG",
    "zero-byte.jpg": "empty",
}
"""`ok`, or a word of the reason."""

LINES = {
    "blank-lines.jsonl": ["ok"] * 3,
    "bom.jsonl": ["ok"] * 5,
    "broken-image.jsonl": ["ok", "ok", "cut short", "ok", "ok"],
    "broken-line.jsonl": ["ok", "ok", ":3: is no JSON", "ok", "ok"],
    "control-characters.jsonl": ["ok"] * 5,
    "cut-last-line.jsonl": ["ok"] * 4 + [":5: is no JSON"],
    "empty-caption.jsonl": ["ok", "ok", ":3: 'caption' is empty", ":4: 'caption' is empty", "ok"],
    "empty.jsonl": [],
    "good.jsonl": ["ok"] * 5,
    "invalid-utf8.jsonl": ["ok", "ok", ":3: is not valid UTF-8", "ok", "ok"],
    "long-caption.jsonl": ["ok"] * 5,
    "long-word.jsonl": ["ok"] * 5,
    "missing-field.jsonl": ["ok", "ok", ":3: has no field 'caption'", ":4: 'image' .* must name a picture", "ok"],
    "missing-image.jsonl": ["ok", "ok", ":3: there is no file .*does-not-exist.jpg", "ok", "ok"],
    "nan.jsonl": ["ok", "ok", ":3: .*NaN is not JSON", "ok", "ok"],
    "path-escape.jsonl": ["ok", "ok", ":3: .*escaped.jpg' leads out of", "ok", "ok"],
    # The list of line 3 is a list of two captions.
    "wrong-type.jsonl": ["ok", ":2: .*not a number", "ok", "ok", ":4: .*must name a picture", ":5: .*no JSON object"],
}
"""One entry an example of the pair stream."""

TARS = {
    "broken-image.tar": ["ok"] * 3 + ["0003: .*cut short"] + ["ok"] * 4,
    "broken-json.tar": ["ok"] * 3 + ["0003.json: is no JSON"] + ["ok"] * 4,
    "cut.tar": ["ok"] * 5 + ["0005: 0005.jpg is cut"],
    "duplicate-key.tar": ["ok", "0001: .*more than once", "ok"],
    "good.tar": ["ok"] * 8,
    # Members are found by their key, wherever they stand.
    "interleaved.tar": ["ok"] * 8,
    "missing-image.tar": ["ok"] * 3 + ["0003: has no picture"] + ["ok"] * 4,
    "missing-json.tar": ["ok"] * 3 + ["0003: has neither a .json nor a .txt"] + ["ok"] * 4,
    "path-traversal.tar": ["ok", "'../escaped.txt' .*is refused", "'a/../../escaped-too.txt' .*is refused", "ok"],
    "symlink-escape.tar": ["ok", "out is a link to '..'", "out/escaped: has no picture", "ok"],
    "zero-byte.tar": ["is empty"],
}
"""One entry an example of the pair stream."""


def transformed(data, name, size=32):
    try:
        return ImageTransform(size, None, MAX_PIXELS)(data, random.Random(0))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def outcome(source, index):
    """ "ok", or the message of an example of the pair stream."""
    try:
        example = source[index]
        assert example.text.strip()
        assert transformed(example.image, example.name).shape == (3, 32, 32)
    except DataError as error:
        return str(error)
    return "ok"


def check(source, name, expected):
    found = [outcome(source, index) for index in range(len(source))]
    assert len(found) == len(expected), found
    for message, wanted in zip(found, expected, strict=True):
        assert (message == "ok") == (wanted == "ok"), message
        assert re.search(wanted, message), message
        assert message == "ok" or message.startswith(name)
        assert "\n" not in message


def test_every_file_is_listed():
    there = {path.name for path in BROKEN.iterdir()} - {"README.md"}
    assert there == {*PICTURES, *LINES, *TARS}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, monkeypatch):
    expected = PICTURES[name]
    if "pixels" in expected:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    data = (BROKEN / name).read_bytes()
    if expected == "ok":
        assert transformed(data, name).shape == (3, 32, 32)
    else:
        with pytest.raises(DataError, match=f"^{name}: .*{expected}"):
            transformed(data, name)


def test_bombs_name_their_size():
    with pytest.raises(DataError, match="3600000000"):
        transformed((BROKEN / "bomb-declared.png").read_bytes(), "bomb-declared.png")
    transform = ImageTransform(32, None, 100_000_000)
    with pytest.raises(DataError, match="12000 x 10000 pixels, more than max_pixels=100000000"):
        transform((BROKEN / "large-120mp.png").read_bytes(), random.Random(0))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_turned_pictures_stand_upright(orientation):
    pixels = transformed((BROKEN / f"exif-orientation-{orientation}.jpg").read_bytes(), "x")
    corners = [pixels[:, y, x] > 100 for y in (4, 27) for x in (4, 27)]
    red, green, blue, yellow = [True, False, False], [False, True, False], [False, False, True], [True, True, False]
    assert [corner.tolist() for corner in corners] == [red, green, blue, yellow]


@pytest.mark.parametrize("name", LINES)
def test_json_lines(name):
    if not LINES[name]:
        with pytest.raises(DataError, match=f"no examples: .*{name}"):
            open_source(BROKEN, "pair", source="jsonl", path=name)
        return
    check(open_source(BROKEN, "pair", source="jsonl", path=name), name, LINES[name])


@pytest.mark.parametrize("name", TARS)
def test_tars(name):
    outside = files_below(SHARED)
    check(open_source(BROKEN, "pair", source="tar", text_field="captions", path=name), name, TARS[name])
    assert files_below(SHARED) == outside


def test_broken_tars_beside_good_ones():
    source = open_source(
        BROKEN, "pair", source="tar", text_field="captions", path=["good.tar", "zero-byte.tar", "interleaved.tar"]
    )
    assert source.blocks == [8, 1, 8]
    assert [i for i in range(len(source)) if outcome(source, i) != "ok"] == [8]
