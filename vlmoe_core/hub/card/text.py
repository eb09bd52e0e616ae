"""Text that others wrote, made harmless in a card: it can neither break a table nor become a link or a tag."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARKS = re.compile(r"([\\`*_\[\]~$!])")
TAGS = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "@": "&#64;", "://": "&#58;//"}


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def one_line(text: str) -> str:
    """The text without line ends, control characters, and what is no Unicode."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def short(count: int) -> str:
    """A count in three digits, such as 1.93B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def escaped(value: object) -> str:
    """A value as Markdown shows it literally, in a table too."""
    if isinstance(value, Markdown):
        return str(value)
    text = one_line(str(value))
    for mark, entity in TAGS.items():
        text = text.replace(mark, entity)
    return MARKS.sub(r"\\\1", text)


def table(rows: Iterable[Sequence[object]], head: Sequence[object]) -> Markdown:
    """A Markdown table; every cell is escaped."""
    lines = [_cells(head), "|" + "---|" * len(head), *map(_cells, rows)]
    return Markdown("\n".join(lines))


def _cells(row: Sequence[object]) -> str:
    return f"| {' | '.join(map(escaped, row))} |"


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of this folder, filled; every value is escaped but for Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=False,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = table
    return environment.get_template(template).render(values)
