"""A routing summary as one HTML file that needs no network.

Plotly's JavaScript, the style, the scripts (template/) and all data lie inside the file. Data are one JSON block, which
the scripts show as text only; a content security policy admits those scripts by hash, and no request.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmoe_core.analysis.routing.embed import embedded, plain
from vlmoe_core.analysis.routing.gallery import Gallery, hang
from vlmoe_core.analysis.routing.pictures import LikedPatch, TracedExample
from vlmoe_core.analysis.routing.summary import CellSummary, Information, RoutingSummary

LIMIT = 15_000_000
"""Most bytes of a report. Examples and patches that no longer fit are left out, and the report says how many."""
HEADINGS = 2_000
"""Bytes that are enough for what the page says around its pictures."""
SCRIPTS = (
    "base",
    "colours",
    "filters",
    "plot",
    "loads",
    "drops",
    "depth",
    "told",
    "pathways",
    "together",
    "atlas",
    "overlays",
    "comparison",
    "main",
)
"""Files of template/js, in the order in which they depend on each other."""
TEMPLATE = Path(__file__).with_name("template")


def write_report(
    summary: RoutingSummary,
    path: Path,
    patches: Sequence[LikedPatch] = (),
    examples: Sequence[TracedExample] = (),
) -> None:
    """Write the report of a trace, at most LIMIT bytes where the summary alone leaves room for pictures.

    Args:
        summary: what the trace found.
        path: the HTML file; an old one is replaced.
        patches: what the experts of vision like most; none: the atlas shows words and places only.
        examples: drawn with the expert of every patch and word; none: the report has no overlays.
    """
    page = _Page(summary)
    bare = page.render(Gallery())
    gallery = hang(patches, examples, LIMIT - HEADINGS - len(bare.encode(errors="xmlcharrefreplace")))
    text = page.render(gallery) if patches or examples else bare
    # A file name that is not valid Unicode can't be encoded: it becomes a character reference.
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


class _Page:
    """The HTML of one summary."""

    def __init__(self, summary: RoutingSummary) -> None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(TEMPLATE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"share": share, "count": count, "number": number}
        self.template = environment.get_template("report.html.j2")
        self.summary, self.plain = summary, _plain_summary(summary)
        self.scripts = _scripts(dense=not summary.cells)
        self.style = (TEMPLATE / "report.css").read_text("utf-8")

    def render(self, gallery: Gallery) -> str:
        """The page with these pictures."""
        found: str = self.template.render(
            summary=self.summary,
            figures=key_figures(self.summary.cells),
            rows=[Row.of(cell) for cell in self.summary.cells],
            sections=_sections(self.summary, gallery),
            gallery=gallery,
            style=self.style,
            scripts=self.scripts,
            hashes=[_hash(script) for script in self.scripts.values()],
            data=embedded({"summary": self.plain, **vars(gallery)}),
        )
        return found


def _scripts(dense: bool) -> dict[str, str]:
    """The switch between light and dark; but for a dense model, which has nothing to plot, plotly and ours as well."""
    from plotly.offline import get_plotlyjs

    folder = TEMPLATE / "js"
    found = {"theme": (folder / "theme.js").read_text("utf-8")}
    if not dense:
        found["plotly"] = get_plotlyjs()
        found["report"] = "\n".join((folder / f"{name}.js").read_text("utf-8") for name in SCRIPTS)
    return found


def _hash(script: str) -> str:
    """As a content security policy wants it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _sections(summary: RoutingSummary, gallery: Gallery) -> dict[str, str]:
    """Name and title of those that there is something to show in."""
    cells = summary.cells
    found = {"loads": "Loads", "drops": "Drops", "depth": "Entropy and confidence", "told": "Specialisation"}
    if any(cell.flow for cell in cells):
        found["pathways"] = "Pathways"
    if any(cell.together for cell in cells):
        found["together"] = "Co-activation"
    found["atlas"] = "Atlas"
    if gallery.examples:
        found["overlays"] = "Overlays"
    if summary.comparison:
        found["comparison"] = "Comparison"
    return found if cells else {}


@dataclass(frozen=True)
class Row:
    """A line of the summary table."""

    cell: CellSummary
    busiest: int | None
    """The expert that was chosen most; null: no token came."""
    busiest_share: float | None
    """Its share of the choices."""
    told: str | None
    """What the expert tells most of, over the control."""
    information: Information | None

    @property
    def most_entropy(self) -> float:
        """Of gates that are all the same, nats."""
        return math.log(self.cell.num_experts)

    @classmethod
    def of(cls, cell: CellSummary) -> "Row":
        """Of one cell."""
        total = sum(cell.wanted)
        busiest = max(range(len(cell.wanted)), key=lambda expert: cell.wanted[expert]) if total else None
        known = [name for name, found in cell.information.items() if math.isfinite(found.excess)]
        told = max(known, key=lambda name: cell.information[name].excess, default=None)
        return cls(
            cell,
            busiest,
            None if busiest is None else cell.wanted[busiest] / total,
            told,
            None if told is None else cell.information[told],
        )


@dataclass(frozen=True)
class Figure:
    """One of the few numbers at the top."""

    name: str
    value: str
    note: str
    """Where it comes from."""


def key_figures(cells: Sequence[CellSummary]) -> list[Figure]:
    """What one wants to know first: how much was routed, dropped, unused, and what experts specialise in."""
    if not cells:
        return []
    layers = {cell.layer for cell in cells}
    wanted, got = (
        sum(sum(counts) for counts in found) for found in zip(*((c.wanted, c.got) for c in cells), strict=True)
    )
    worst = max(cells, key=lambda cell: cell.dropped)
    dead = [cell for cell in cells if cell.dead]
    told = [row for row in map(Row.of, cells) if row.information is not None]
    found = [
        Figure("Tokens routed", count(sum(cell.tokens for cell in cells)), f"in {len(layers)} sparse layers together"),
        Figure(
            "Choices dropped",
            share(1 - got / wanted if wanted else None),
            f"most: {share(worst.dropped)} in {_name(worst)}",
        ),
        Figure("Experts without a token", str(sum(len(cell.dead) for cell in dead)), _where_dead(dead)),
    ]
    if told:
        best = max(told, key=lambda row: row.information.excess if row.information else 0.0)
        assert best.information is not None
        note = f"bits over chance that an expert tells of the {best.told}, in {_name(best.cell)}"
        found.append(Figure("Strongest specialisation", number(best.information.excess), note))
    return found


def _where_dead(cells: Sequence[CellSummary]) -> str:
    if not cells:
        return "every expert was chosen everywhere"
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return f"in {_name(cells[0])}{more}"


def _name(cell: CellSummary) -> str:
    return f"{cell.task}, {cell.modality}, layer {cell.layer}"


def share(value: float | None) -> str:
    """In per cent."""
    return "n/a" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def count(value: int) -> str:
    """With thousands apart."""
    return f"{value:,}"


def number(value: float | None) -> str:
    """Two decimals."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _plain_summary(summary: RoutingSummary) -> dict[str, Any]:
    """As in the JSON file, but places hold the share of each expert, in thousandths: most of a report's data."""
    found = summary.as_json()
    for cell in found["cells"]:
        cell["places"] = [_thousandths(row) for row in cell["places"]]
    content: dict[str, Any] = plain(found)
    return content


def _thousandths(counts: Sequence[int]) -> list[int]:
    total = max(1, sum(counts))
    return [round(1000 * n / total) for n in counts]
