"""JSON files that hold one long list of objects: `{"info": {...}, "questions": [{...}, ...]}`.

An annotation file of 400 MB is walked through once; after that its objects are read one by one, by their place.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmoe_core.data.files import BYTE_ORDER_MARK
from vlmoe_core.errors import DataError

BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class ListItem:
    """One object of the list."""

    number: int
    """Its number in the list, from 1."""
    start: int
    """Its first byte in the file."""
    size: int
    """Its length in bytes."""
    fields: dict[str, Any]
    """Its content. Strings are no text yet (bytes read as Latin-1): read the bytes again for them."""


def list_items(path: Path, name: str, where: str) -> Iterator[ListItem]:
    """The objects of the list `name` in the object that a JSON file holds.

    Raises DataError, beginning with `where` (the file), if that is not how the file is made.
    """
    # As Latin-1 a character is a byte, so places are bytes. JSON's own signs are ASCII, which no byte of a longer
    # UTF-8 character is, so the file is taken apart as it would be as UTF-8.
    scanner = _Scanner(path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode("latin-1"))
    skipped = path.stat().st_size - len(scanner.text)
    try:
        place = _find(scanner, name, where)
        for number, (start, end, value) in enumerate(_items(scanner, place), start=1):
            if not isinstance(value, dict):
                raise DataError(f"{where}: item {number} of '{name}' is no JSON object {{...}}")
            yield ListItem(number, skipped + start, end - start, value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON, or was cut: {error}") from error


@dataclass(frozen=True)
class _Scanner:
    """Reads JSON piece by piece; JSONDecodeError where something else stands."""

    text: str
    decoder: json.JSONDecoder = field(default_factory=json.JSONDecoder)

    def step(self, place: int, sign: str) -> int:
        """Where the next thing begins, behind a sign that must stand at `place` or behind blanks."""
        place = self.skip(place)
        if not self.text.startswith(sign, place):
            raise json.JSONDecodeError(f"Expecting '{sign}'", self.text, place)
        return self.skip(place + 1)

    def skip(self, place: int) -> int:
        """The first place that is not blank."""
        match = BLANK.match(self.text, place)
        return match.end() if match else place

    def value(self, place: int) -> tuple[Any, int]:
        """The value that begins at a place, and where it ends."""
        return self.decoder.raw_decode(self.text, place)


def _find(scanner: _Scanner, name: str, where: str) -> int:
    """Where the list of that name begins."""
    known = []
    if not scanner.text.startswith("{", scanner.skip(0)):
        raise DataError(f"{where}: holds no JSON object with a list '{name}'")
    place = scanner.step(0, "{")
    while True:
        key, place = scanner.value(place)
        place = scanner.step(place, ":")
        if key == name:
            return place
        known.append(str(key))
        _, place = scanner.value(place)
        if scanner.text.startswith("}", scanner.skip(place)):
            raise DataError(f"{where}: has no list '{name}'; its fields: {', '.join(known)}")
        place = scanner.step(place, ",")


def _items(scanner: _Scanner, place: int) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each item of the list that begins at a place."""
    place = scanner.step(place, "[")
    while not scanner.text.startswith("]", place):
        value, end = scanner.value(place)
        yield place, end, value
        place = scanner.skip(end)
        if not scanner.text.startswith("]", place):
            place = scanner.step(place, ",")
