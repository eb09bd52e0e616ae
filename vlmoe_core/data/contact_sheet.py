"""A contact sheet: examples of each stream as training sees them, with what is hidden drawn on them.

Axis letters: C channels, H height, W width, G patches along an image's side.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1440
MARGIN = 48
GAP = 20
PADDING = 14
RADIUS = 8

PAPER, CARD, EDGE = "#f3f4f6", "#ffffff", "#dfe2e7"
INK, FAINT, VEIL = "#1b2130", "#6a7283", "#22304f"
VEIL_OPACITY = 0.84
LINE_HEIGHT = 1.5
MOST_LINES = 14
WORD_GAP = 5.0
"""Pixels that words stand apart beyond a blank, so that marks do not touch."""
SEAM = 3.0
"""Pixels between a hidden and a seen piece of one word."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Piece:
    """A token of a text, as it is drawn."""

    text: str
    """Its letters."""
    hidden: bool
    """The model must predict it."""
    glued: bool
    """It continues the word of the piece before."""


@dataclass(frozen=True)
class Cell:
    """One example."""

    pixels_CHW: NDArray[np.uint8] | None
    """RGB; None without a picture."""
    hidden_GG: NDArray[np.bool_] | None
    """The hidden patches; None without a picture."""
    pieces: tuple[Piece, ...]
    """The text; empty without one."""


@dataclass(frozen=True)
class Panel:
    """The examples of one stream."""

    title: str
    """Name of the stream."""
    note: str
    """What is seen, in a few words."""
    columns: int
    """Cells side by side."""
    cells: tuple[Cell, ...]
    """The examples, in order."""


def draw_contact_sheet(title: str, note: str, panels: Sequence[Panel]) -> Image.Image:
    """An RGB picture, 1440 pixels wide and as high as the panels need."""
    blocks = [_heading(title, note, 34, 17), *(_panel(panel) for panel in panels)]
    height = 2 * MARGIN + sum(block.height for block in blocks) + 2 * GAP * (len(blocks) - 1)
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + 2 * GAP
    return sheet


def _panel(panel: Panel) -> Image.Image:
    """Title and cells; the cells of a row are equally high."""
    heading = _heading(panel.title, panel.note, 24, 16)
    width = (WIDTH - 2 * MARGIN - (panel.columns - 1) * GAP) // panel.columns
    cells = [_Card(cell, width) for cell in panel.cells]
    rows = [cells[i : i + panel.columns] for i in range(0, len(cells), panel.columns)]
    heights = [max(card.height for card in row) for row in rows]
    picture = Image.new("RGB", (WIDTH - 2 * MARGIN, heading.height + sum(h + GAP for h in heights)), PAPER)
    picture.paste(heading, (0, 0))
    top = heading.height + GAP
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            card.draw(picture, column * (width + GAP), top, height)
        top += height + GAP
    return picture


def _heading(title: str, note: str, size: int, note_size: int) -> Image.Image:
    font, small = default_font(size), default_font(note_size)
    lines = _wrapped(note, small, WIDTH - 2 * MARGIN)
    line = round(note_size * LINE_HEIGHT)
    top = round(size * 1.35)
    picture = Image.new("RGB", (WIDTH - 2 * MARGIN, top + line * len(lines)), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), drawable(title, font), INK, font)
    for number, text in enumerate(lines):
        draw.text((0, top + number * line), text, FAINT, small)
    return picture


class _Card:
    """A cell laid out for its width: a picture with the veil, and below it the text."""

    def __init__(self, cell: Cell, width: int) -> None:
        self.cell, self.width = cell, width
        self.font = default_font(16)
        self.line = round(16 * LINE_HEIGHT)
        self.lines = lay_out(cell.pieces, self.font, width - 2 * PADDING)
        text_height = len(self.lines) * self.line + 2 * PADDING if self.lines else 0
        self.height = text_height + (width if cell.pixels_CHW is not None else 0)

    def draw(self, sheet: Image.Image, left: int, top: int, height: int) -> None:
        """Draw the card, as high as its row."""
        draw = ImageDraw.Draw(sheet)
        draw.rounded_rectangle((left, top, left + self.width - 1, top + height - 1), RADIUS, CARD, EDGE)
        text_top = top + PADDING
        if self.cell.pixels_CHW is not None and self.cell.hidden_GG is not None:
            picture = veiled(self.cell.pixels_CHW, self.cell.hidden_GG, self.width)
            sheet.paste(
                picture, (left, top), _corners(self.width, rounded_below=not self.lines and height == self.height)
            )
            text_top += self.width
        for number, line in enumerate(self.lines):
            self._draw_line(draw, line, left + PADDING, text_top + number * self.line)

    def _draw_line(
        self, draw: ImageDraw.ImageDraw, line: Sequence[tuple[Piece, float]], left: float, top: float
    ) -> None:
        # All marks before all letters: a mark reaches a little under its neighbours.
        for piece, offset in line:
            if piece.hidden:
                x = left + offset
                box = (x - 2, top, x + self.font.getlength(piece.text) + 2, top + self.line - 3)
                draw.rounded_rectangle(box, 4, VEIL)
        for piece, offset in line:
            draw.text((left + offset, top + 1), piece.text, CARD if piece.hidden else INK, self.font)


def veiled(pixels_CHW: NDArray[np.uint8], hidden_GG: NDArray[np.bool_], side: int) -> Image.Image:
    """The picture at its drawn size, hidden patches under a dark veil through which a little can be seen."""
    picture = Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    mask = Image.fromarray(hidden_GG.astype(np.uint8) * round(255 * VEIL_OPACITY))
    veil = Image.new("RGB", (side, side), VEIL)
    return Image.composite(veil, picture, mask.resize((side, side), Image.Resampling.NEAREST))


def _corners(side: int, rounded_below: bool) -> Image.Image:
    """What of a picture is seen within the round corners of its card."""
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rounded_rectangle(
        (0, 0, side - 1, side - 1), RADIUS, 255, corners=(True, True, rounded_below, rounded_below)
    )
    return mask


def lay_out(pieces: Sequence[Piece], font: Font, width: float) -> list[list[tuple[Piece, float]]]:
    """Lines of (piece, distance from the left), words kept whole; what is beyond MOST_LINES becomes dots."""
    space = font.getlength(" ") + WORD_GAP
    lines: list[list[tuple[Piece, float]]] = [[]]
    x = 0.0
    for word in _words(pieces, font, width):
        if lines[-1] and x + space + _length(word, font) > width:
            lines.append([])
            x = 0.0
        x += space if lines[-1] else 0.0
        for number, piece in enumerate(word):
            x += SEAM if number and piece.hidden != word[number - 1].hidden else 0.0
            lines[-1].append((piece, x))
            x += font.getlength(piece.text)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], [(Piece("...", False, False), 0.0)]]
    return lines if lines[0] else []


def _length(word: Sequence[Piece], font: Font) -> float:
    seams = sum(a.hidden != b.hidden for a, b in pairwise(word))
    return sum(font.getlength(piece.text) for piece in word) + SEAM * seams


def _words(pieces: Sequence[Piece], font: Font, width: float) -> list[list[Piece]]:
    """Runs of glued pieces, each no longer than a line."""
    words: list[list[Piece]] = []
    for piece in pieces:
        shown = Piece(_shortened(drawable(piece.text, font), font, width), piece.hidden, piece.glued)
        if piece.glued and words and _length((*words[-1], shown), font) <= width:
            words[-1].append(shown)
        else:
            words.append([shown])
    return words


def _wrapped(text: str, font: Font, width: float) -> list[str]:
    pieces = [Piece(word, hidden=False, glued=False) for word in text.split()]
    return [" ".join(piece.text for piece, _ in line) for line in lay_out(pieces, font, width)]


def _shortened(text: str, font: Font, width: float) -> str:
    """The text, or as much of its start as fits, with dots."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def default_font(size: int) -> Font:
    """Pillow's own font: no file of the machine is needed."""
    return ImageFont.load_default(size)


def drawable(text: str, font: Font) -> str:
    """The text with what Pillow's font lacks replaced: letters without their accents, else a question mark."""
    missing = bytes(font.getmask("\uffff"))
    return "".join(_known(letter, font, missing) for letter in text)


def _known(letter: str, font: Font, missing: bytes) -> str:
    for form in (letter, unicodedata.normalize("NFKD", letter)[:1]):
        if form.isprintable() and (form == " " or bytes(font.getmask(form)) != missing):
            return form
    return "?"
