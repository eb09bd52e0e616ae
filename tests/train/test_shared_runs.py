"""Whole runs with shared experts, in float32 with grouped arithmetic: the losses of one process."""

import os
from collections.abc import Mapping, Sequence
from itertools import product
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


def run_named(folder: Path, named: Mapping[str, tuple[int, LoadedRecipe]]) -> dict[str, Path]:
    """The folders of finished runs, each with its number of ranks."""
    for ranks in sorted({ranks for ranks, _ in named.values()}):
        names = [name for name in named if named[name][0] == ranks]
        recipes, folders = [named[name][1] for name in names], [folder / name for name in names]
        for outcomes in on_ranks(ranks, run_all, recipes, folders, [free_port() for _ in names]):
            assert isinstance(outcomes, list), outcomes
            assert all(outcome.finished for outcome in outcomes)
    return {name: folder / name for name in named}


def test_float32_losses_of_20_steps(tmp_path: Path) -> None:
    """And held-out figures: 3 examples are one micro-batch and half of another, so that of 4 ranks two read nothing."""
    runs = run_named(tmp_path, {n: (ranks, tiny(tmp_path, *LONG, *more)) for n, (ranks, more) in RUNS.items()})
    expected = metrics(runs.pop("alone"))
    for run in runs.values():
        found = metrics(run)
        assert len(found) == len(expected) == 22
        for line, straight in zip(found, expected, strict=True):
            losses = {k: v for k, v in straight.items() if k.startswith(("loss/", "balance/", "baseline/"))}
            assert losses.keys() <= line.keys() == straight.keys()
            assert {k: line[k] for k in losses} == pytest.approx(losses, abs=1e-4)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)


MESHES = {"alone": (), "expert 2": ("parallel.expert=2",), "full": ("parallel={expert: 2, shard: full}",)}
FURTHER = ("task", "contrast", "retrieval", "empty stream")
SHORT = ("train.steps=3", "train.save_every=9")


def test_further_recipes_train_as_without_a_mesh(tmp_path: Path) -> None:
    """Contrast asks for as many ranks as micro-batches, so that its runs without shared experts have two as well."""
    pictures(tmp_path / "held"), pictures(tmp_path / "train", broken=tuple(range(1, 24)))
    broken = ("data.on_error=skip", "tokenizers.visual.codebook_size=4", "tokenizers.visual.fit_images=24")
    named = {}
    for mesh, more in MESHES.items():
        alone = 2 - (mesh == "alone")
        named[f"task, {mesh}"] = alone, tuned(tmp_path, "vqa", *SHORT, "batch.micro.pair=4", *more)
        named[f"contrast, {mesh}"] = 2, tiny(tmp_path, *SHORT, "objective.weights.itc=1", *more)
        named[f"retrieval, {mesh}"] = 2, tuned(tmp_path, "retrieval", *SHORT, "batch.micro.pair=4", *more)
        named[f"empty stream, {mesh}"] = alone, picture_recipe(tmp_path, *broken, *more)
    lines = {name: metrics(run) for name, run in run_named(tmp_path, named).items()}
    assert_called_rightly({name: lines[f"{name}, alone"] for name in FURTHER})
    for name, mesh in product(FURTHER, MESHES):
        for line, straight in zip(lines[f"{name}, {mesh}"], lines[f"{name}, alone"], strict=True):
            assert line.keys() == straight.keys() and line["split"] == straight["split"]
            expected = {key: value for key, value in straight.items() if key != "split"}
            found = {key: value for key, value in line.items() if key != "split"}
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, mesh)


def assert_called_rightly(lines: Mapping[str, list[dict[str, Any]]]) -> None:
    """Each recipe does what its name says."""
    parts = {name: set().union(*map(set, of_recipe)) for name, of_recipe in lines.items()}
    assert any(name.startswith("metric/") for name in parts["task"])
    assert "loss/itc" in parts["contrast"] and {"loss/itc", "loss/itm"} <= parts["retrieval"]
    trained = [line for line in lines["empty stream"] if line["split"] == "train"]
    assert any("loss/mim" not in line for line in trained) and all("loss/mlm" in line for line in trained)
