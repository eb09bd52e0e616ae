"""Draws the held-out losses of several runs as one PNG: python docs/plot_curves.py OUT.png NAME=RUN_FOLDER ..."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from vlmoe_core.train.metrics import read_metrics

PARTS = {
    "mlm": "words of texts",
    "mim": "patches of images",
    "vlm_text": "words of captions",
    "vlm_image": "patches of pairs",
}


def main(out: Path, runs: dict[str, Path]) -> None:
    """One panel a loss, one line a run, the unigram baseline dashed."""
    figure, axes = pyplot.subplots(1, len(PARTS), figsize=(15, 3.4), constrained_layout=True)
    for axis, (part, title) in zip(axes, PARTS.items(), strict=True):
        for name, folder in runs.items():
            lines = read_metrics(folder / "metrics.jsonl", "eval")
            axis.plot([line["step"] for line in lines], [line[f"loss/{part}"] for line in lines], label=name)
        axis.axhline(lines[0][f"baseline/{part}"], color="gray", linestyle="--", linewidth=1, label="unigram")
        axis.set(title=f"{part}: {title}", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss (nats)")
    axes[0].legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), {name: Path(folder) for name, _, folder in (a.partition("=") for a in sys.argv[2:])})
