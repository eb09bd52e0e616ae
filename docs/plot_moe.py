"""Draws what sparse layers cost with more choices and more experts: python docs/plot_moe.py OUT.png < CURVES.json

The JSON comes from: python -m tests.benchmarks.moe_layer --curves --json
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = {
    "grouped": "ours (grouped)",
    "tutel": "Tutel's own layer",
    "dense": "dense, equal FLOPs",
    "dense + traffic": "dense + traffic of the experts' weights",
}
AXES = {"top_k": "experts a token (k)", "num_experts": "experts (E)"}


def main(out: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """One panel a curve: seconds of forward and backward of each side."""
    figure, axes = pyplot.subplots(1, len(AXES), figsize=(10, 3.8), constrained_layout=True)
    for axis, (field, label) in zip(axes, AXES.items(), strict=True):
        points = curves[field]
        for name, title in NAMES.items():
            values = [seconds(point, name) for point in points]
            if None not in values:
                style = "--" if name.startswith("dense") else "-"
                axis.plot([point[field] for point in points], values, style, marker="o", markersize=4, label=title)
        axis.set(xlabel=label, ylim=(0, None), title=sizes(points[0], field))
        axis.set_xticks([point[field] for point in points])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward + backward (s)")
    axes[0].legend(frameon=False)
    figure.savefig(out, dpi=110)


def seconds(point: dict[str, Any], name: str) -> float | None:
    """Seconds of one side, or of the sum of two; None where it was not measured."""
    parts = [point["seconds"].get(part) for part in name.split(" + ")]
    return None if None in parts else sum(parts)


def sizes(point: dict[str, Any], field: str) -> str:
    """What stays the same along a curve."""
    rest = f"E = {point['num_experts']}" if field == "top_k" else f"k = {point['top_k']}"
    return f"{point['dim']} x {point['hidden']}, {point['tokens']:,} tokens, {point['dtype']}, {rest}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.load(sys.stdin)["curves"])
