"""The one way in which verbs print: results on stdout, everything else on stderr.

A verb says its result twice, once for people and once for machines; `--json` decides which one is printed.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

Row = Mapping[str, object]


@dataclass(frozen=True)
class Output:
    """Prints for people, with colours in a terminal and as plain lines elsewhere, or one JSON document for machines."""

    json: bool = False
    """Whether machines read stdout."""

    def data(self, value: Any) -> None:
        """The result for machines: printed with `--json` only, once a command. What is not finite becomes null."""
        if self.json:
            typer.echo(json.dumps(_finite(value), ensure_ascii=False, indent=2, default=str))

    def text(self, text: str) -> None:
        """A result for people, as it is."""
        if not self.json:
            typer.echo(text, nl=not text.endswith("\n"))

    def table(self, rows: Sequence[Row], title: str = "") -> None:
        """A result for people: a row for each mapping, a column for each key of the first one."""
        if self.json or not rows:
            return
        header = list(rows[0])
        cells = [[_cell(row.get(name)) for name in header] for row in rows]
        if sys.stdout.isatty():
            numeric = [all(isinstance(row.get(name), int | float) for row in rows) for name in header]
            _print_rich(header, cells, numeric, title)
        else:
            _print_plain([header, *cells], title)

    def record(self, fields: Row, title: str = "") -> None:
        """A result for people: names with their values, one a line."""
        if self.json:
            return
        cells = [[name, _cell(value)] for name, value in fields.items()]
        if sys.stdout.isatty():
            _print_rich([], cells, [False, False], title)
        else:
            _print_plain(cells, title)

    def note(self, text: str) -> None:
        """What a person may want to know, on stderr."""
        typer.echo(text, err=True)

    def warn(self, text: str) -> None:
        """What a person should know, on stderr."""
        typer.secho("warning: ", err=True, nl=False, fg=typer.colors.YELLOW, bold=True)
        typer.echo(text, err=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _print_plain(lines: Sequence[Sequence[str]], title: str) -> None:
    """Columns side by side, two spaces apart, never cut."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if title:
        typer.echo(title)
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich(header: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=bool(header)
    )
    for index, is_number in enumerate(numeric):
        name = header[index] if header else ""
        table.add_column(
            name, justify="right" if is_number else "left", overflow="fold", style=None if header or index else "cyan"
        )
    for row in cells:
        # Text, not str: a cell may hold [MASK], which rich would read as markup.
        table.add_row(*map(Text, row))
    Console().print(table)
