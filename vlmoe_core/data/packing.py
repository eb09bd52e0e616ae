"""Packs of whole sentences: the examples that a long document makes for the text stream."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Span = tuple[int, int]
"""First character and the one past the last, in a document."""

_END = re.compile(
    r"(?P<stop>[.!?\u2026]+)[\"'\u201d\u2019)\]]*(?=\s)"  # a stop with its closing quotes, before a blank
    r"|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019]*"  # a CJK stop
    r"|\n\s*\n"
)
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|[Mm]rs?|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[Ff]ig|[Vv]ol|Jr|Sr|Gen|Col|Capt|Hon|Rev)\.$"
)
_LOOK_AROUND = 12
_WORD = re.compile(r"\S+")


class Piece(NamedTuple):
    """A part of a document and its number of tokens."""

    start: int
    end: int
    tokens: int


def sentences(text: str) -> list[Span]:
    """The sentences of a text in order, without the blanks around them. Together they hold every word.

    A simple rule: a sentence ends at a stop that is followed by a blank and no small letter, unless an abbreviation or
    an initial stands before it. A wrong cut costs a model little.
    """
    spans, start = [], 0
    for match in _END.finditer(text):
        if _ends_here(text, match):
            spans.append((start, match.end()))
            start = match.end()
    spans.append((start, len(text)))
    return [trimmed for span in spans if (trimmed := _trim(text, span))]


def _ends_here(text: str, match: re.Match[str]) -> bool:
    if match["stop"] is None:
        return True
    before = text[max(0, match.end() - _LOOK_AROUND) : match.end()]
    after = text[match.end() : match.end() + _LOOK_AROUND].lstrip()
    return not after[:1].islower() and not _ABBREVIATION.search(before)


def _trim(text: str, span: Span) -> Span | None:
    """The span without blanks at its ends; None if nothing is left."""
    piece = text[span[0] : span[1]]
    start = span[0] + len(piece) - len(piece.lstrip())
    end = start + len(piece.strip())
    return (start, end) if end > start else None


def pack(text: str, limit: int, count: Callable[[str], int]) -> list[Span]:
    """Runs of whole sentences of at most `limit` tokens, as long as they can be, in order; no word is lost.

    A sentence that is longer is cut between words, a word that is longer between characters.

    Args:
        text: one document.
        limit: most tokens a pack, special tokens not counted.
        count: tokens of a piece of text.
    """
    pieces = [piece for span in sentences(text) for piece in _fitting(text, span, limit, count)]
    return [(piece.start, piece.end) for piece in _join(text, pieces, limit, count)]


def _fitting(text: str, span: Span, limit: int, count: Callable[[str], int]) -> Iterator[Piece]:
    """The span, or the parts of it that fit; a single character always does."""
    start, end = span
    tokens = count(text[start:end])
    if tokens <= limit or end - start == 1:
        yield Piece(start, end, tokens)
        return
    parts = [match.span() for match in _WORD.finditer(text, start, end)]
    if len(parts) == 1:
        middle = (start + end) // 2
        parts = [(start, middle), (middle, end)]
    pieces = [piece for part in parts for piece in _fitting(text, part, limit, count)]
    yield from _join(text, pieces, limit, count)


def _join(text: str, pieces: Sequence[Piece], limit: int, count: Callable[[str], int]) -> Iterator[Piece]:
    """Neighbouring pieces, joined as far as the limit allows.

    The sum of their tokens says how far to go; since a joined text may have other tokens than its pieces, it is counted
    again, and shortened while it is too long.
    """
    first = 0
    while first < len(pieces):
        last, total = first + 1, pieces[first].tokens
        while last < len(pieces) and total + pieces[last].tokens <= limit:
            total += pieces[last].tokens
            last += 1
        while last > first + 1 and (total := count(text[pieces[first].start : pieces[last - 1].end])) > limit:
            last -= 1
        tokens = total if last > first + 1 else pieces[first].tokens
        yield Piece(pieces[first].start, pieces[last - 1].end, tokens)
        first = last
