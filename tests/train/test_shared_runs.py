"""Whole runs with shared experts, in float32 with grouped arithmetic: the losses of one process."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train.support import free_port, fresh_process, metrics, on_ranks, tiny
from tests.train.tasks_support import tuned
from tests.train.test_broken import pictures
from tests.train.test_broken import recipe as picture_recipe
from tests.train.test_ranks import LONG
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import run_training
from vlmoe_core.train.session import RunOptions


def run_all(recipes: Sequence[LoadedRecipe], folders: Sequence[Path], ports: Sequence[int]) -> list[Any]:
    """For a child: whole runs, one after the other; each leaves its group of processes at the end."""
    outcomes = []
    for loaded, folder, port in zip(recipes, folders, ports, strict=True):
        fresh_process()
        os.environ["MASTER_PORT"] = str(port)
        outcomes.append(run_training(loaded, RunOptions(folder), Reporter()))
    return outcomes


RUNS = {
    "alone": (1, ()),
    "2 ranks, expert 2": (2, ("parallel.expert=2",)),
    "4 ranks, expert 4": (4, ("parallel.expert=4",)),
    "4 ranks, expert 2, full": (4, ("parallel={expert: 2, shard: full}",)),
}
"""Ranks and overrides of whole runs in float32 with grouped experts."""
SEVERAL = [name for name in RUNS if name != "alone"]


def run_named(folder: Path, named: Mapping[str, tuple[int, LoadedRecipe]]) -> dict[str, Path]:
    """The folders of finished runs, each with its number of ranks."""
    for ranks in sorted({ranks for ranks, _ in named.values()}):
        names = [name for name in named if named[name][0] == ranks]
        recipes, folders = [named[name][1] for name in names], [folder / name for name in names]
        for outcomes in on_ranks(ranks, run_all, recipes, folders, [free_port() for _ in names]):
            assert isinstance(outcomes, list), outcomes
            assert all(outcome.finished for outcome in outcomes)
    return {name: folder / name for name in named}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folders, by the names of RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    return run_named(folder, {n: (ranks, tiny(folder, *LONG, *more)) for n, (ranks, more) in RUNS.items()})


@pytest.mark.parametrize("name", SEVERAL)
def test_float32_losses_of_20_steps(runs: dict[str, Path], name: str) -> None:
    expected, found = metrics(runs["alone"]), metrics(runs[name])
    assert len(found) == len(expected) == 22
    for line, straight in zip(found, expected, strict=True):
        losses = {k: v for k, v in straight.items() if k.startswith(("loss/", "balance/", "baseline/"))}
        assert losses.keys() <= line.keys() == straight.keys()
        assert {k: line[k] for k in losses} == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("name", SEVERAL)
def test_held_out_figures_with_fewer_micro_batches_than_ranks(runs: dict[str, Path], name: str) -> None:
    """3 held-out examples are one micro-batch and half of another: of 4 ranks two have nothing to read."""
    assert metrics(runs[name])[0] == pytest.approx(metrics(runs["alone"])[0], abs=1e-6)


MESHES = {"alone": (), "expert 2": ("parallel.expert=2",), "full": ("parallel={expert: 2, shard: full}",)}
FURTHER = ("task", "contrast", "retrieval", "empty stream")
SHORT = ("train.steps=3", "train.save_every=9")


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of other recipes, by name and mesh. Contrast asks for as many ranks as micro-batches, so that its
    runs without a shared expert have two ranks as well."""
    folder = tmp_path_factory.mktemp("further")
    pictures(folder / "held"), pictures(folder / "train", broken=tuple(range(1, 24)))
    broken = ("data.on_error=skip", "tokenizers.visual.codebook_size=4", "tokenizers.visual.fit_images=24")
    named = {}
    for mesh, more in MESHES.items():
        alone = 2 - (mesh == "alone")
        named[f"task, {mesh}"] = alone, tuned(folder, "vqa", *SHORT, "batch.micro.pair=4", *more)
        named[f"contrast, {mesh}"] = 2, tiny(folder, *SHORT, "objective.weights.itc=1", *more)
        named[f"retrieval, {mesh}"] = 2, tuned(folder, "retrieval", *SHORT, "batch.micro.pair=4", *more)
        named[f"empty stream, {mesh}"] = alone, picture_recipe(folder, *broken, *more)
    return run_named(folder, named)


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "alone"])
@pytest.mark.parametrize("name", FURTHER)
def test_further_recipes_train_as_without_a_mesh(further: dict[str, Path], name: str, mesh: str) -> None:
    found, expected = metrics(further[f"{name}, {mesh}"]), metrics(further[f"{name}, alone"])
    for line, straight in zip(found, expected, strict=True):
        assert line.keys() == straight.keys() and line.pop("split") == straight.pop("split")
        assert line == pytest.approx(straight, rel=1e-4, abs=1e-4)


def test_further_recipes_are_what_they_are_called(further: dict[str, Path]) -> None:
    parts = {name: set().union(*map(set, metrics(further[f"{name}, alone"]))) for name in FURTHER}
    assert "metric/accuracy" in parts["task"] or any(name.startswith("metric/") for name in parts["task"])
    assert "loss/itc" in parts["contrast"] and {"loss/itc", "loss/itm"} <= parts["retrieval"]
    trained = [line for line in metrics(further["empty stream, alone"]) if line["split"] == "train"]
    assert any("loss/mim" not in line for line in trained) and all("loss/mlm" in line for line in trained)
