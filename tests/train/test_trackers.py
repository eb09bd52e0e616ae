"""Trackers beside metrics.jsonl."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.support import tiny, train
from vlmoe_core.errors import RecipeError
from vlmoe_core.train.metrics import read_metrics


def test_a_tracker_that_is_not_installed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmoe_core.train.parallel.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"train\.trackers names wandb, which is not installed"):
        train(tiny(tmp_path, "train.trackers=[wandb]"), tmp_path / "out")


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(tiny(tmp_path, "train.trackers=[tensorboard]", "train.steps=2", "train.eval_every=1"), out)
    events = EventAccumulator(str(next(out.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    for split in ("train", "eval"):
        lines = read_metrics(out / "metrics.jsonl", split)
        scalars = events.Scalars(f"{split}/loss/mlm")
        assert [scalar.step for scalar in scalars] == [line["step"] for line in lines]
        assert [scalar.value for scalar in scalars] == pytest.approx([line["loss/mlm"] for line in lines])


def test_a_resumed_run_goes_on_under_the_id_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *args, **kwargs: given.append(kwargs["init_kwargs"]))
    out = tmp_path / "out"
    train(tiny(tmp_path, "train.steps=4"), out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    train(tiny(tmp_path, "train.steps=4"), out, resume="auto")
    train(tiny(tmp_path, "train.steps=2"), tmp_path / "other")
    first, resumed, other = (kwargs["wandb"]["id"] for kwargs in given)
    assert first == resumed != other
    assert given[0]["wandb"]["resume"] == "allow"
    assert given[1]["trackio"] == {"name": first, "resume": "allow"}
