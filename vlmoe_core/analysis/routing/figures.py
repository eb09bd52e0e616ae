"""The key figures of a trace as PNG files, for papers and model cards.

They are as wide as a column of a page with two columns. Lines have the colours of Okabe and Ito, which colour-blind
readers can tell apart, and different marks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from vlmoe_core.analysis.routing.summary import CellSummary, Information, RoutingSummary

WIDTH, DPI = 3.4, 200
"""Inches, and pixels an inch."""
SMALL, LARGE = 6.5, 7.5
"""Points of tick labels and legends, and of titles."""
INK, FAINT, EMPTY = "#222222", "#999999", "#e6e6e6"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = "os^Dv<>"
TOKENS = {"vision": "image tokens", "text": "text tokens"}
LABELS = {"word": "word", "word class": "word class", "place": "position", "kind": "token kind", "class": "image class"}
"""What is told of a token, in words; the order decides the colours."""
LAYER = "layer, counted from 0"
FAR = 2
"""Loads from a 2 ** FAR-th of the even share to 2 ** FAR times as much have colours of their own."""
STEPS = 33
"""Colours of loads; the middle one is the even share."""
NARROW = 16
"""Most experts of heat maps that stand side by side."""
MOST_ROWS = 12
"""Most layers of a heat map that are named."""


def write_figures(summary: RoutingSummary, folder: Path) -> list[Path]:
    """Draw loads, drops, entropy by depth and information; 200 dpi, each below 200 kB.

    Args:
        summary: of a trace; without sparse layers nothing is drawn.
        folder: where the files go; made where it is missing.

    Returns:
        The files: `loads.png`, `drops.png`, `entropy.png` and `information.png`, less those that would be empty.
    """
    written = []
    for name, draw in _figures().items():
        if (figure := draw(summary)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.png"
            _save(figure, path)
            written.append(path)
    return written


def _figures() -> Mapping[str, Callable[[RoutingSummary], Figure | None]]:
    return {"loads": draw_loads, "drops": draw_drops, "entropy": draw_entropy, "information": draw_information}


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, a third as large as one of all."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, format="PNG", dpi=(DPI, DPI), optimize=True)


def draw_loads(summary: RoutingSummary) -> Figure | None:
    """Heat maps of the wanted load over the even share, layers by experts, for each task and modality."""
    panels = _panels(cell for cell in summary.cells if cell.tokens)
    if not panels:
        return None
    widest = max(cell.num_experts for cells in panels.values() for cell in cells)
    columns = 1 if widest > NARROW or len(panels) == 1 else 2
    layers = min(MOST_ROWS, max(len(cells) for cells in panels.values()))
    figure, axes = _figure(len(panels), columns, 0.5 + 0.15 * layers, extra=0.55)
    for number, (axis, ((task, modality), cells)) in enumerate(zip(axes, panels.items(), strict=True)):
        shown = _heat_map(axis, cells)
        _set_words(axis, f"{task}, {TOKENS[modality]}", "expert" if number + columns >= len(axes) else "", "layer")
    _set_scale(figure, shown, axes)
    return figure


def draw_drops(summary: RoutingSummary) -> Figure | None:
    """Share of the choices that found no place, by layer: a panel for each modality, a line for each task.

    VL-MoE (arXiv 2303.07226) shows such a figure in its appendix.
    """
    figure = _by_task(summary, lambda cell: cell.dropped if cell.tokens else None, "choices dropped")
    if figure is None:
        return None
    most = max(cell.dropped for cell in summary.cells)
    figure.axes[0].set_ylim(-0.03 * max(most, 0.01), 1.08 * max(most, 0.01))
    figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    figure.suptitle(f"capacity: {_capacity(summary.capacity)}", fontsize=SMALL, color=INK)
    return figure


def draw_entropy(summary: RoutingSummary) -> Figure | None:
    """Mean entropy of the gates over log E, by layer: a panel for each modality, a line for each task.

    Layers of one expert have none.
    """
    figure = _by_task(summary, _relative_entropy, "router entropy / log E")
    if figure is not None:
        figure.axes[0].set_ylim(-0.03, 1.04)
    return figure


def draw_information(summary: RoutingSummary) -> Figure | None:
    """What the expert tells of the token, over the shuffled control, by layer: a line for each label, 95 % intervals.

    A panel for each task and modality.
    """
    panels = _panels(cell for cell in summary.cells if cell.information)
    if not panels:
        return None
    told = dict.fromkeys(name for cells in panels.values() for cell in cells for name in cell.information)
    names = list(LABELS) + [name for name in told if name not in LABELS]
    figure, axes = _figure(len(panels), min(2, len(panels)), 1.45, extra=0.5)
    for number, (axis, ((task, modality), cells)) in enumerate(zip(axes, panels.items(), strict=True)):
        axis.axhline(0, color=FAINT, linewidth=0.6)
        for name in names:
            found = {c.layer: c.information[name] for c in cells if name in c.information}
            _line(axis, {layer: one.excess for layer, one in found.items()}, names.index(name), _errors(found))
        _set_words(axis, f"{task}, {TOKENS[modality]}", LAYER, "bits" if number % 2 == 0 else "")
        axis.xaxis.set_major_locator(_layer_ticks(cells))
        axis.margins(y=0.1)
    _set_legend(figure, {LABELS.get(name, name): names.index(name) for name in names if name in told})
    figure.suptitle("mutual information with the expert, over the shuffled control", fontsize=SMALL, color=INK)
    return figure


def _by_task(summary: RoutingSummary, value: Callable[[CellSummary], float | None], words: str) -> Figure | None:
    """A panel for each modality, which share their axes; null where no cell has a value."""
    known = [(cell, found) for cell in summary.cells if (found := value(cell)) is not None]
    if not known:
        return None
    tasks = list(dict.fromkeys(cell.task for cell, _ in known))
    modalities = [modality for modality in TOKENS if any(cell.modality == modality for cell, _ in known)]
    figure, axes = _figure(len(modalities), len(modalities), 1.5, extra=0.4, shared=True)
    for axis, modality in zip(axes, modalities, strict=True):
        for number, task in enumerate(tasks):
            _line(axis, {c.layer: found for c, found in known if (c.task, c.modality) == (task, modality)}, number)
        axis.xaxis.set_major_locator(_layer_ticks(cell for cell, _ in known))
        _set_words(axis, TOKENS[modality], LAYER, words if axis is axes[0] else "")
    _set_legend(figure, {task: number for number, task in enumerate(tasks)})
    return figure


def _panels(cells: Iterable[CellSummary]) -> dict[tuple[str, str], list[CellSummary]]:
    """Cells by task and modality, from the first layer on."""
    panels: dict[tuple[str, str], list[CellSummary]] = {}
    for cell in cells:
        panels.setdefault((cell.task, cell.modality), []).append(cell)
    return {key: sorted(found, key=lambda cell: cell.layer) for key, found in panels.items()}


def _relative_entropy(cell: CellSummary) -> float | None:
    return cell.entropy / math.log(cell.num_experts) if cell.num_experts > 1 and cell.tokens else None


def _capacity(capacity: Mapping[str, str]) -> str:
    """Of each pool, in words; once where all are alike."""
    if len(set(capacity.values())) == 1:
        return next(iter(capacity.values()))
    return ", ".join(f"{pool} {words}" for pool, words in capacity.items())


def _errors(found: Mapping[int, Information]) -> NDArray[np.float64]:
    """(2, layers) how far the intervals reach below and above."""
    below = [max(0.0, found[layer].excess - found[layer].low) for layer in sorted(found)]
    above = [max(0.0, found[layer].high - found[layer].excess) for layer in sorted(found)]
    return np.array([below, above])


def _heat_map(axis: Axes, cells: Sequence[CellSummary]) -> AxesImage:
    """A row for each layer, the first below; a cross on experts that no token chose."""
    experts = max(cell.num_experts for cell in cells)
    load = np.full((len(cells), experts), np.nan)
    for row, cell in enumerate(cells):
        load[row, : cell.num_experts] = np.array(cell.wanted) * cell.num_experts / sum(cell.wanted)
    dead = np.argwhere(load == 0)
    colour = np.log2(np.maximum(load, 2.0 ** -(FAR + 1)))
    axis.set_facecolor(EMPTY)
    shown = axis.imshow(
        colour, cmap=colormaps["RdBu_r"].resampled(STEPS), vmin=-FAR, vmax=FAR, aspect="auto", origin="lower"
    )
    axis.plot(dead[:, 1], dead[:, 0], "x", color="white", markersize=2.5, markeredgewidth=0.6)
    rows = range(0, len(cells), -(-len(cells) // MOST_ROWS))
    axis.set_yticks(rows, [str(cells[row].layer) for row in rows])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axis.set_xlim(-0.5, experts - 0.5)
    return shown


def _set_scale(figure: Figure, shown: ScalarMappable, axes: Sequence[Axes]) -> None:
    """The colours of all heat maps, below them."""
    gap = 0.12 / figure.get_figheight()
    bar = figure.colorbar(shown, ax=list(axes), location="bottom", extend="both", aspect=40, shrink=0.85, pad=gap)
    steps = range(-FAR, FAR + 1)
    bar.set_ticks(list(steps), labels=[f"1/{2**-s}" if s < 0 else f"{2**s}" for s in steps])
    bar.set_label("wanted load over the even share (cross: dead expert)", fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL, length=2, width=0.5, labelcolor=INK)
    bar.outline.set_linewidth(0.5)


def _figure(
    panels: int, columns: int, height: float, extra: float, shared: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """Axes of so many panels by rows, each so many inches high, with extra room for what stands below them."""
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, rows * height + extra), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _set_words(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=LARGE, color=INK)
    axis.set_xlabel(x, fontsize=SMALL, color=INK)
    axis.set_ylabel(y, fontsize=SMALL, color=INK)
    axis.tick_params(labelsize=SMALL, length=2, width=0.5, color=FAINT, labelcolor=INK)
    for spine in axis.spines.values():
        spine.set(linewidth=0.5, color=FAINT)


def _line(axis: Axes, value: Mapping[int, float], number: int, errors: NDArray[np.float64] | None = None) -> None:
    """Values by layer in the colour and mark of that number."""
    layers = sorted(value)
    axis.errorbar(layers, [value[layer] for layer in layers], errors, **_look(number), elinewidth=0.8, capsize=1.5)
    axis.spines[["top", "right"]].set_visible(False)


def _layer_ticks(cells: Iterable[CellSummary]) -> FixedLocator:
    """Sparse layers, not too many."""
    return FixedLocator(sorted({cell.layer for cell in cells}), nbins=8)


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 3,
        "linewidth": 1,
    }


def _set_legend(figure: Figure, numbers: Mapping[str, int]) -> None:
    """What the colours and marks stand for, below all panels."""
    lines = [Line2D([], [], **_look(number), label=name) for name, number in numbers.items()]
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=SMALL, columnspacing=1.2)
    legend.set_frame_on(False)
