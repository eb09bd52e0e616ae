"""The contact sheet: what is hidden can be seen to be hidden, and nothing leaves its place."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageChops

from vlmoe_core.data.contact_sheet import (
    CARD,
    MARGIN,
    MOST_LINES,
    PADDING,
    PAPER,
    VEIL,
    WIDTH,
    Cell,
    Panel,
    Piece,
    default_font,
    draw_contact_sheet,
    drawable,
    lay_out,
    veiled,
)


def seen(text: str, glued: bool = False) -> Piece:
    return Piece(text, hidden=False, glued=glued)


def hidden(text: str, glued: bool = False) -> Piece:
    return Piece(text, hidden=True, glued=glued)


def picture(value: int = 250) -> np.ndarray:
    return np.full((3, 16, 16), value, dtype=np.uint8)


def sheet(*cells: Cell, columns: int = 2) -> Image.Image:
    return draw_contact_sheet("title", "a note", [Panel("pair stream", "source", columns, cells)])


def share(image: Image.Image, color: str) -> float:
    """Share of the pixels that have exactly this colour."""
    wanted = np.array(Image.new("RGB", (1, 1), color))[0, 0]
    return float((np.array(image) == wanted).all(-1).mean())


def test_the_veil_covers_the_hidden_patches_and_no_other() -> None:
    mask = np.zeros((4, 4), dtype=np.bool_)
    mask[0, 1] = mask[3, 3] = True
    pixels = np.array(veiled(picture(), mask, 200))
    dark = pixels.reshape(4, 50, 4, 50, 3).max(axis=(1, 3, 4)) < 128
    assert (dark == mask).all()
    bright = pixels.reshape(4, 50, 4, 50, 3).min(axis=(1, 3, 4)) == 250
    assert (bright == ~mask).all()


def test_what_lies_under_the_veil_can_still_be_seen() -> None:
    half = picture()
    half[:, :, :8] = 0
    mask = np.ones((4, 4), dtype=np.bool_)
    pixels = np.array(veiled(half, mask, 200)).astype(int)
    assert (pixels[:, 150] - pixels[:, 50]).min() > 20


def test_a_hidden_word_is_marked_and_a_seen_one_is_not() -> None:
    plain = sheet(Cell(None, None, (seen("red"), seen("circle"))))
    marked = sheet(Cell(None, None, (seen("red"), hidden("circle"))))
    assert plain.size == marked.size
    assert share(plain, VEIL) == 0 < share(marked, VEIL)
    box = ImageChops.difference(plain, marked).getbbox()
    red = default_font(16).getlength("red")
    assert box is not None and box[0] >= MARGIN + PADDING + red


def test_hidden_pieces_of_one_word_keep_all_their_letters() -> None:
    whole = light_in_marks(sheet(Cell(None, None, (hidden("mmmmmmmm"),))))
    letters = tuple(hidden("m", glued=number > 0) for number in range(8))
    assert light_in_marks(sheet(Cell(None, None, letters))) > 0.99 * whole


def light_in_marks(image: Image.Image) -> float:
    """How much brighter than a mark all pixels are together, within the rectangle that holds all marks."""
    pixels = np.array(image).astype(int) - np.array(Image.new("RGB", (1, 1), VEIL))[0, 0]
    marked = (pixels == 0).all(-1)
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    return float(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].sum())


def test_margins_are_even() -> None:
    cells = [Cell(picture(0), np.zeros((4, 4), np.bool_), (seen("word"),) * n) for n in (3, 40, 7, 1)]
    drawn = sheet(*cells)
    box = ImageChops.difference(drawn, Image.new("RGB", drawn.size, PAPER)).getbbox()
    assert drawn.width == WIDTH and box is not None
    assert box[0] == MARGIN and WIDTH - box[2] == MARGIN and box[1] >= MARGIN
    assert drawn.height - box[3] >= MARGIN


def test_text_wraps_inside_its_card_and_words_stay_whole() -> None:
    font = default_font(16)
    pieces = [seen("under"), hidden("stand", glued=True), seen("a"), hidden("very"), seen("long"), seen("sentence")] * 3
    lines = lay_out(pieces, font, 150)
    assert len(lines) > 1
    for line in lines:
        assert not line[0][0].glued and line[0][1] == 0
        places = [(x, x + font.getlength(piece.text)) for piece, x in line]
        assert places[-1][1] <= 150
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert [piece for line in lines for piece, _ in line] == pieces


def test_a_long_text_and_a_long_word_end_in_dots() -> None:
    font = default_font(16)
    lines = lay_out([seen("word")] * 1000, font, 100)
    assert len(lines) == MOST_LINES and lines[-1][0][0].text == "..."
    ((piece, _),) = lay_out([seen("w" * 500)], font, 100)[0]
    assert piece.text.endswith("w...") and font.getlength(piece.text) <= 100


LETTERS = [("a ·", "a ·"), ("café", "cafe"), ("狗", "?"), ("a\0b", "a?b"), ("", "")]


@pytest.mark.parametrize(("text", "drawn"), LETTERS)
def test_letters_that_the_font_lacks(text: str, drawn: str) -> None:
    assert drawable(text, default_font(16)) == drawn


def test_rows_and_empty_panels() -> None:
    cell = Cell(picture(), np.zeros((4, 4), np.bool_), ())
    one, two = sheet(cell, cell), sheet(cell, cell, cell)
    side = (WIDTH - 2 * MARGIN - 20) // 2
    assert two.height - one.height == side + 20
    assert sheet().height < one.height
    assert draw_contact_sheet("t", "n", []).width == WIDTH
    assert share(sheet(Cell(None, None, (seen("a"),))), CARD) > 0.05
