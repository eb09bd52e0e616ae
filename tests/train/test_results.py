"""Results that are kept in a run folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlmoe_core.errors import CheckpointError, TrainError
from vlmoe_core.train.results import read_results, save_result

REPORT: dict[str, Any] = {
    "task": "vqa",
    "model": "/home/somebody/runs/vqa/checkpoints/step-00000004",
    "split": "test",
    "n": 28,
    "metrics": {"tr@5": 30.0, "tr@10": 40.5, "accuracy": 10.25},
    "intervals": {"accuracy": (0.0, 21.5)},
    "baselines": {"majority": {"accuracy": 17.5}},
    "baseline_intervals": {"majority": {"accuracy": (3.5, 35.0)}},
    "broken": 1,
    "comparison": {"other": "/home/somebody/other"},
}


def test_what_is_kept_comes_back_without_paths(tmp_path: Path) -> None:
    path = save_result(tmp_path, REPORT, "vlmoe scenes (drawn)", 4, None)
    assert path == tmp_path / "results" / "vqa-test.json"
    assert "somebody" not in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["vqa-test.json"]
    (found,) = read_results(tmp_path)
    assert (found.task, found.data, found.split, found.step) == ("vqa", "vlmoe scenes (drawn)", "test", 4)
    assert (found.n, found.limit, found.broken) == (28, None, 1)
    assert list(found.metrics.items()) == list(REPORT["metrics"].items())
    assert found.intervals == REPORT["intervals"]
    assert (found.baselines, found.baseline_intervals) == (REPORT["baselines"], REPORT["baseline_intervals"])


def test_a_run_that_was_never_evaluated_has_none(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []


def test_an_older_result_goes_but_one_of_a_part_or_of_other_data_stays(tmp_path: Path) -> None:
    save_result(tmp_path, REPORT, "data", 4, None)
    save_result(tmp_path, REPORT | {"n": 9, "broken": 0}, "data", 6, 9)
    save_result(tmp_path, REPORT, "other data", 6, None)
    save_result(tmp_path, REPORT, "data", 8, 1000)  # there were fewer: nothing was cut
    found = {(r.data, r.limit): r.step for r in read_results(tmp_path)}
    assert found == {("data", None): 8, ("data", 9): 6, ("other data", None): 6}
    save_result(tmp_path, REPORT, "other data", 9, None)
    assert {(r.data, r.limit): r.step for r in read_results(tmp_path)} == found | {("other data", None): 9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("10.25", "99.25"), "has been altered"),
        (lambda text: text.replace('"step": 4', '"step": 5'), "has been altered"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2, this vlmoe reads 1"),
        (lambda text: text[:-9], "is no result of vlmoe eval"),
        (lambda text: "[]", "is no result of vlmoe eval"),
        (lambda text: json.dumps({"accuracy": 1}), "is no result of vlmoe eval"),
        (lambda text: "\xff", "is no result of vlmoe eval"),
    ],
)
def test_what_was_altered_or_is_foreign_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    path = save_result(tmp_path, REPORT, "data", 4, None)
    path.write_bytes(change(path.read_text()).encode("latin-1"))
    with pytest.raises(CheckpointError, match=message) as error:
        read_results(tmp_path)
    assert str(path) in str(error.value)
    save_result(tmp_path, REPORT, "data", 4, None)
    assert len(read_results(tmp_path)) == 1


def test_a_disk_that_refuses_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(TrainError, match="can't be kept"):
        save_result(tmp_path, REPORT, "data", 4, None)
