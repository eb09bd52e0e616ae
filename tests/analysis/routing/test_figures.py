"""The figures show the summary's numbers, fit their width and stay small."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vlmoe_core.analysis.routing.figures import (
    draw_drops,
    draw_entropy,
    draw_information,
    draw_loads,
    write_figures,
)
from vlmoe_core.analysis.routing.summary import CellSummary, Information, RoutingSummary

NAMES = ["drops.png", "entropy.png", "information.png", "loads.png"]
WORDS = ("word", "word class", "place", "kind")


def cell(
    task: str,
    layer: int,
    modality: str,
    wanted: Sequence[int],
    dropped: int = 0,
    entropy: float = 0.5,
    information: Mapping[str, Information] | None = None,
) -> CellSummary:
    """`dropped` of the first expert's choices found no place."""
    return CellSummary(
        task=task,
        layer=layer,
        modality=modality,
        pool=modality,
        num_experts=len(wanted),
        top_k=1,
        tokens=sum(wanted),
        wanted=wanted,
        got=[wanted[0] - dropped, *wanted[1:]],
        first=wanted,
        gate=[1 / len(wanted)] * len(wanted),
        entropy=entropy,
        entropy_std=0.1,
        confidence=0.5,
        confidence_std=0.1,
        entropy_histogram=[0] * 20,
        confidence_histogram=[0] * 20,
        dead=[e for e, n in enumerate(wanted) if n == 0],
        overloaded=[],
        gini=0.0,
        variation=0.0,
        kinds={},
        dropped_by_kind={},
        places=[],
        dropped_by_place=[],
        dropped_share_histogram=[0] * 20,
        together=None,
        flow_from=None,
        flow=None,
        information=information or {},
    )


def told(excess: float, low: float, high: float) -> Information:
    return Information(bits=excess + 0.25, control=0.25, low=low, high=high, labels=5, label_bits=2.0)


def summary(*cells: CellSummary, capacity: str = "1.25 (training)") -> RoutingSummary:
    return RoutingSummary("model", 1, "data", {"vision": capacity, "text": "1.25 (training)"}, {}, {}, cells)


def large() -> RoutingSummary:
    """32 experts in six layers of both modalities."""
    rng = random.Random(0)
    cells = [
        cell(
            task,
            layer,
            modality,
            [rng.choice([0, 50, 100, 300, 900]) for _ in range(31)] + [500],
            0,
            rng.uniform(0, math.log(32)),
            {name: told(rng.random(), 0.0, 1.0) for name in (*WORDS, "class")},
        )
        for task, modality in (("mim", "vision"), ("mlm", "text"), ("vlm", "vision"), ("vlm", "text"))
        for layer in range(1, 12, 2)
    ]
    return summary(*cells, capacity="dropless")


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def lines(axis: Axes) -> dict[tuple[float, ...], tuple[float, ...]]:
    """Places along x of every line with marks, and its values."""
    found = [line for line in axis.get_lines() if len(line.get_xdata()) and line.get_marker() in "os^Dv<>"]
    return {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in found}


def test_the_files_are_small_pngs_of_a_column_width(tmp_path: Path) -> None:
    written = write_figures(large(), tmp_path / "new" / "figures")
    assert sorted(path.name for path in written) == NAMES
    for path in written:
        assert path.parent == tmp_path / "new" / "figures" and path.stat().st_size < 200_000
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width == 680
            assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            pixels = np.asarray(picture.convert("L"))
        assert (pixels < 250).mean() > 0.02
        edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert all((edge > 250).all() for edge in edges), f"{path.name}: something is cut off"


def test_a_model_without_sparse_layers_has_no_figures(tmp_path: Path) -> None:
    assert write_figures(summary(), tmp_path / "figures") == []
    assert not (tmp_path / "figures").exists()


def test_experts_that_got_nothing_and_single_experts_are_drawn_or_left_out(tmp_path: Path) -> None:
    nothing, single = cell("mim", 1, "vision", [0, 0, 0]), cell("mlm", 0, "text", [9], entropy=0.0)
    assert write_figures(summary(nothing), tmp_path) == []
    assert sorted(path.name for path in write_figures(summary(nothing, single), tmp_path)) == ["drops.png", "loads.png"]


def test_loads_are_over_the_even_share_and_dead_experts_are_crossed() -> None:
    figure = drawn(
        draw_loads(
            summary(
                cell("mim", 3, "vision", [40, 20, 10, 10]),
                cell("mim", 1, "vision", [10, 0]),
                cell("mlm", 0, "text", [5, 5]),
            )
        )
    )
    vision, text = figure.axes[:2]
    assert [vision.get_title(), text.get_title()] == ["mim, image tokens", "mlm, text tokens"]
    assert [label.get_text() for label in vision.get_yticklabels()] == ["1", "3"]
    shown = np.ma.filled(vision.images[0].get_array().astype(float), np.nan)  # type: ignore[union-attr]
    np.testing.assert_allclose(shown[0], [1, -3, np.nan, np.nan])
    np.testing.assert_allclose(shown[1], [1, 0, -1, -1])
    assert vision.images[0].get_clim() == text.images[0].get_clim() == (-2, 2)
    crosses = vision.get_lines()[0]
    assert list(zip(crosses.get_xdata(), crosses.get_ydata(), strict=True)) == [(1, 0)]
    assert len(text.get_lines()[0].get_xdata()) == 0


def test_drops_have_a_line_for_each_task() -> None:
    figure = drawn(
        draw_drops(
            summary(
                cell("vlm", 3, "vision", [10, 10], 4),
                cell("vlm", 1, "vision", [10, 10], 1),
                cell("mim", 1, "vision", [10, 30], 6),
                cell("vlm", 0, "text", [10, 10], 3),
                cell("vlm", 2, "text", [0, 0]),
                capacity="0.5",
            )
        )
    )
    vision, text = figure.axes
    assert lines(vision) == {(1, 3): pytest.approx((0.05, 0.2)), (1,): pytest.approx((0.15,))}
    assert lines(text) == {(0,): pytest.approx((0.15,))}
    assert [vision.get_title(), text.get_title(), vision.get_ylabel()] == [
        "image tokens",
        "text tokens",
        "choices dropped",
    ]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["vlm", "mim"]
    assert figure.get_suptitle() == "capacity: vision 0.5, text 1.25 (training)"
    assert drawn(draw_drops(large())).get_suptitle() == "capacity: vision dropless, text 1.25 (training)"
    assert drawn(draw_drops(summary(cell("mim", 1, "vision", [4, 4])))).get_suptitle() == "capacity: 1.25 (training)"


def test_entropy_is_a_share_of_the_most() -> None:
    figure = drawn(
        draw_entropy(
            summary(
                cell("mim", 1, "vision", [5] * 4, entropy=math.log(2)),
                cell("mim", 2, "vision", [5] * 8, entropy=math.log(8)),
                cell("mim", 3, "vision", [5], entropy=0.0),
            )
        )
    )
    (axis,) = figure.axes
    assert lines(axis) == {(1, 2): pytest.approx((0.5, 1.0))}


def test_information_has_its_interval() -> None:
    cells = (
        cell("vlm", 2, "text", [5, 5], information={"word": told(0.5, 0.25, 1.0), "place": told(0.0, -0.125, 0.25)}),
        cell("vlm", 4, "text", [5, 5], information={"word": told(1.0, 0.875, 1.125)}),
        cell("vlm", 2, "vision", [5, 5]),
    )
    figure = drawn(draw_information(summary(*cells)))
    (axis,) = figure.axes
    assert axis.get_title() == "vlm, text tokens"
    assert lines(axis) == {(2, 4): (0.5, 1.0), (2,): (0.0,)}
    bars = [segment.tolist() for bar in axis.collections for segment in bar.get_segments()]  # type: ignore[attr-defined]
    assert sorted(bars) == sorted([[[2, 0.25], [2, 1.0]], [[4, 0.875], [4, 1.125]], [[2, -0.125], [2, 0.25]]])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["word", "position"]
    colours = {line.get_color() for line in axis.get_lines() if line.get_marker() in "os^Dv<>"}
    assert {handle.get_color() for handle in figure.legends[0].get_lines()} <= colours
