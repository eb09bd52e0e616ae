"""The curves of docs/SCALING.md, and that the page shows what the model says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vlmoe_core.analysis.scaling.curves import BASE, LARGE, MODELS, WORLDS, curve, recipe_of
from vlmoe_core.analysis.scaling.machine import H100, machine_of

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "SCALING.md").read_text("utf-8")


def plot_scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_scaling", DOCS / "plot_scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_large_model_is_100_times_the_paper() -> None:
    sizes = [recipe_of(name).model.num_params(30522) for name in (BASE, LARGE)]
    assert sizes[0] == pytest.approx(1.93e9, rel=0.01)
    assert 95 <= sizes[1] / sizes[0] <= 105


def test_numbers_of_gpus_go_from_8_to_4096() -> None:
    assert WORLDS[0] == 8 and WORLDS[-1] == 4096


def test_strong_scaling_keeps_the_step_and_ends_with_its_examples() -> None:
    points = curve(BASE, "strong", machine_of(H100))
    assert all(p.micro * p.micros * p.world == p.size == 2048 for p in points[:-1])
    assert points[-1].bound == "batch" and points[-1].step is None and not points[-1].runs


@pytest.mark.parametrize("model", MODELS)
def test_weak_scaling_grows_the_step_and_gets_no_faster(model: str) -> None:
    points = curve(model, "weak", machine_of(H100))
    assert len({p.size // p.world for p in points}) == 1
    speed = [p.size / p.step.seconds for p in points if p.step is not None and p.runs]
    assert speed == sorted(speed)
    assert all(p.step.efficiency <= 1 for p in points if p.step is not None)


def test_the_large_model_does_not_fit_on_four_nodes() -> None:
    points = curve(LARGE, "strong", machine_of(H100), (8, 16, 32, 64))
    assert [p.runs for p in points] == [False, False, False, True]
    assert {p.bound for p in points[:3]} == {"memory"}


@pytest.mark.parametrize("name", ["constants", "collectives", "step", "parts", "sizes"])
def test_the_page_shows_the_tables(name: str) -> None:
    assert plot_scaling().tables()[name] in PAGE, f"python docs/plot_scaling.py --tables: {name} differs"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scaling", ("strong", "weak"))
def test_the_page_shows_the_curves(model: str, scaling: str) -> None:
    table = plot_scaling().tables()[f"{model}, {scaling}"]
    assert table in PAGE, f"python docs/plot_scaling.py --tables: {model}, {scaling} differs"


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    plot_scaling().main(tmp_path)
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(drawn) == {"scaling-parts.png", "scaling-speed.png"}
    assert all(1000 < size < 200_000 for size in drawn.values())
    assert all((DOCS / name).exists() and name in PAGE for name in drawn)
