"""Draws docs/SCALING.md's curves from the cost model, or prints its tables.

    python docs/plot_scaling.py docs             # scaling-parts.png, scaling-speed.png
    python docs/plot_scaling.py --tables         # the tables, from the model and from docs/scaling.json

docs/scaling.json holds what was measured: the figures of the benchmarks collectives and predicted_step.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from vlmoe_core.analysis.scaling.curves import MODELS, Point, Scaling, curve, recipe_of
from vlmoe_core.analysis.scaling.machine import H100, machine_of

MEASURED = Path(__file__).parent / "scaling.json"
SCALINGS: tuple[Scaling, ...] = ("strong", "weak")
COLOURS = {
    "compute": "#4c78a8",
    "memory bandwidth": "#9ecae9",
    "exchange inside a node": "#f2cf5b",
    "exchange between nodes": "#f58518",
    "gradient sync": "#54a24b",
    "gathering weights": "#b279a2",
}
COLLECTIVES = ("all_to_all", "all_reduce", "reduce_scatter", "all_gather")


def main(folder: Path) -> None:
    """Both pictures."""
    curves = {(model, scaling): curve(model, scaling, machine_of(H100)) for model in MODELS for scaling in SCALINGS}
    draw_parts(folder / "scaling-parts.png", curves)
    draw_speed(folder / "scaling-speed.png", curves)


def draw_parts(out: Path, curves: dict[tuple[str, Scaling], list[Point]]) -> None:
    """What a step's time goes into: a panel for each model and kind of scaling."""
    figure, axes = pyplot.subplots(len(MODELS), len(SCALINGS), figsize=(15, 9), constrained_layout=True)
    for row, model in zip(axes, MODELS, strict=True):
        for axis, scaling in zip(row, SCALINGS, strict=True):
            points = curves[model, scaling]
            _draw_bars(axis, points)
            axis.set_title(f"{model}, {scaling} scaling: {_size_of(model, scaling)}", fontsize=11)
            axis.set_xlabel("GPUs; experts shared by e; full: weights cut; ck: activations recomputed", fontsize=9)
    axes[0][0].set_ylabel("share of a step")
    axes[1][0].set_ylabel("share of a step")
    handles = [Patch(color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(out, dpi=90)
    pyplot.close(figure)


def _draw_bars(axis: Axes, points: list[Point]) -> None:
    for place, point in enumerate(points):
        if point.step is None or not point.runs:
            axis.text(place, 0.5, f"{point.bound}\nbound", ha="center", va="center", color="gray", fontsize=9)
            continue
        bottom = 0.0
        for name, seconds in point.step.parts.items():
            share = seconds / point.step.seconds
            axis.bar(place, share, bottom=bottom, color=COLOURS[name], width=0.8)
            bottom += share
        axis.text(place, 1.01, _duration(point.step.seconds), ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(points)), [_tick(point) for point in points], fontsize=8)
    axis.set_ylim(0, 1.09)
    axis.set_xlim(-0.6, len(points) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _tick(point: Point) -> str:
    if point.step is None or not point.runs:
        return f"{point.world:,}"
    layout = point.step.layout
    words = [f"{point.world:,}", f"e {layout.expert}"]
    return "\n".join(words + ["full"] * (layout.shard == "full") + ["ck"] * point.checkpointed)


def _size_of(model: str, scaling: Scaling) -> str:
    batch = recipe_of(model).batch
    if scaling == "strong":
        return f"{batch.size.image:,} examples of each stream a step"
    return f"{batch.micro.image} of each stream a GPU"


def draw_speed(out: Path, curves: dict[tuple[str, Scaling], list[Point]]) -> None:
    """Examples a second against GPUs, and what it would be without anything but operations."""
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(11, 4.4), constrained_layout=True)
    for axis, model in zip(axes, MODELS, strict=True):
        for scaling, style in zip(SCALINGS, ("o-", "s--"), strict=True):
            found = [
                (p.world, p.size / p.step.seconds) for p in curves[model, scaling] if p.step is not None and p.runs
            ]
            axis.plot(*zip(*found, strict=True), style, markersize=4, label=f"{scaling} scaling")
        weak = [p for p in curves[model, "weak"] if p.step is not None]
        perfect = [(p.world, p.size / p.step.useful) for p in weak if p.step is not None]
        axis.plot(*zip(*perfect, strict=True), ":", color="gray", label="operations alone")
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title=model)
        axis.set_xticks([p.world for p in weak], [f"{p.world:,}" for p in weak], fontsize=8, rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("examples of each stream a second")
    axes[0].legend(frameon=False)
    figure.savefig(out, dpi=100)
    pyplot.close(figure)


def tables() -> dict[str, str]:
    """The tables of docs/SCALING.md, by name."""
    measured = json.loads(MEASURED.read_text("utf-8"))
    found = {
        "constants": _constants(),
        "collectives": _collectives(measured["collectives"]),
        "step": _steps(measured["step"]),
        "parts": _parts(measured["step"]),
        "sizes": _sizes(),
    }
    for model in MODELS:
        for scaling in SCALINGS:
            found[f"{model}, {scaling}"] = _curve(curve(model, scaling, machine_of(H100)))
    return found


def _table(titles: list[str], rows: Iterator[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _constants() -> str:
    rows = ([one.name, f"{one.value:g} {one.unit}".strip(), one.source] for one in H100)
    return _table(["constant", "value", "where from"], rows)


def _collectives(figures: dict[str, float]) -> str:
    ranks = sorted({int(name.split("_")[-3]) for name in figures if name.endswith("alpha_us")})

    def rows() -> Iterator[list[str]]:
        for name in COLLECTIVES:
            cells = [name.replace("_", "-")]
            for count in ranks:
                one = {key: figures[f"{name}_{count}_{key}"] for key in ("alpha_us", "gb_s", "error")}
                cells += [f"{one['alpha_us'] / 1e3:.2f} ms", f"{one['gb_s']:.2f} GB/s", f"{one['error']:.0%}"]
            yield cells

    titles = [f"{word}, {count} processes" for count in ranks for word in ("alpha", "bytes a second", "error")]
    return _table(["", *titles], rows())


def _steps(figures: dict[str, Any]) -> str:
    names = {"alone": "alone", "dp2": "two processes, `expert: 1`", "ep2": "two processes, `expert: 2`"}

    def rows() -> Iterator[list[str]]:
        for name, title in names.items():
            measured, predicted = figures["measured_s"][name], figures["predicted_s"][name]
            error = "-" if name == "alone" else f"{predicted / measured - 1:+.0%}"
            yield [title, f"{measured:.2f} s", f"{predicted:.2f} s", error]

    return _table(["step", "measured", "predicted", "error"], rows())


def _parts(figures: dict[str, Any]) -> str:
    parts = figures["parts_s"]
    names = [name for name in parts["ep2"] if any(parts[side].get(name, 0) for side in parts)]
    rows = ([name, *(f"{parts[side].get(name, 0):.3f} s" for side in ("alone", "dp2", "ep2"))] for name in names)
    return _table(["part of the prediction", "alone", "`expert: 1`", "`expert: 2`"], rows)


def _sizes() -> str:
    def rows() -> Iterator[list[str]]:
        for name in MODELS:
            recipe = recipe_of(name)
            model, words = recipe.model, recipe.tokenizers.text.vocab_size
            assert model.moe.vision is not None, "both models are sparse"
            yield [
                name,
                f"{model.layers} x {model.dim:,} x {model.hidden:,}",
                f"{model.moe.vision.num_experts} + {model.moe.vision.num_experts}",
                f"{model.num_params(words) / 1e9:,.1f} B",
                f"{model.num_active_params(words) / 1e9:,.2f} B",
                f"{recipe.batch.size.image:,}",
                f"{recipe.batch.micro.image}",
            ]

    titles = ["model", "blocks x width x hidden", "experts of a sparse block", "encoder", "applied per token"]
    return _table([*titles, "`batch.size`", "`batch.micro`"], rows())


def _curve(points: list[Point]) -> str:
    titles = ["GPUs", "micro", "expert", "shard", "recomputed", "memory", "step", "of perfect", "bound by"]

    def rows() -> Iterator[list[str]]:
        for point in points:
            yield [f"{point.world:,}", *_cells(point), point.bound]

    return _table(titles, rows())


def _cells(point: Point) -> list[str]:
    if point.step is None:
        return ["-"] * 7
    layout, memory = point.step.layout, f"{point.step.memory / 1e9:.0f} GB"
    micro = f"{point.micro} x {point.micros}" if point.micros > 1 else f"{point.micro}"
    how = [micro, f"{layout.expert}", layout.shard, "yes" if point.checkpointed else "no", memory]
    return how + ([_duration(point.step.seconds), f"{point.step.efficiency:.0%}"] if point.runs else ["-", "-"])


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


if __name__ == "__main__":
    if sys.argv[1:] == ["--tables"]:
        for title, text in tables().items():
            print(f"{title}\n\n{text}\n")
    else:
        main(Path(sys.argv[1]))
