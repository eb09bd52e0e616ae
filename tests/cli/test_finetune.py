"""`vlmoe finetune` as it is typed."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tasks_support import rows_of, vlmoe
from tests.train.tasks_support import TASKS, recipe_text
from vlmoe_core.train.step import Stepper, StepResult

MAIN = {"vqa": "accuracy", "nlvr2": "accuracy", "retrieval": "tr@1", "classification": "top1", "nli": "accuracy"}


@pytest.mark.parametrize("task", TASKS)
def test_the_closing_table_tells_the_metric_before_and_after_and_what_is_next(work: Path, task: str) -> None:
    shown, told = (work / f"{task}.out").read_text(), (work / f"{task}.err").read_text()
    lines = [json.loads(line) for line in (work / "runs" / task / "metrics.jsonl").read_text().splitlines()]
    before, after = (line[f"metric/{MAIN[task]}"] for line in (lines[0], lines[-1]))
    assert [MAIN[task], f"{before:.4g}", f"{after:.4g}"] in list(rows_of(shown))
    assert f"vlmoe eval {task} --model runs/{task}" in shown
    assert "left out of runs/base/checkpoints/step-00000002: heads.image, heads.text" in told
    assert f"run folder runs/{task}" in told and f"saved runs/{task}/checkpoints/step-00000004" in told


def test_the_run_folder_needs_nothing_else(work: Path) -> None:
    step = work / "runs" / "vqa" / "checkpoints" / "step-00000004"
    assert {"recipe.yaml", "state.json", "manifest.json", "tokenizers"} <= {path.name for path in step.iterdir()}
    answers = json.loads((step / "tokenizers" / "labels" / "labels.json").read_text())
    assert {"yes", "no"} < set(answers)


def test_a_pretraining_recipe_is_sent_to_pretrain(work: Path) -> None:
    expected = "'base.yaml' pretrains: it has an objective and no task; run it with vlmoe pretrain base.yaml"
    assert expected in vlmoe(work, "finetune", "base.yaml").message


def test_a_pretraining_recipe_with_a_model_is_no_finetuning_either(work: Path) -> None:
    expected = "run it with vlmoe pretrain base.yaml"
    assert expected in vlmoe(work, "finetune", "base.yaml", "--model", "runs/base").message


def test_a_finetuning_recipe_is_sent_to_finetune(work: Path, tmp_path: Path) -> None:
    """Also where what it starts from is not there yet."""
    for folder in (work, tmp_path):
        (tmp_path / "vqa.yaml").write_text(recipe_text("vqa", "runs/base"))
        done = vlmoe(folder, "pretrain", "vqa.yaml")
        assert done.code == 2
        assert "'vqa.yaml' finetunes: it has a task and no objective; run it with vlmoe finetune vqa.yaml" in (
            done.message
        )


def test_without_what_it_starts_from_the_command_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "vqa.yaml").write_text(recipe_text("vqa", "runs/base"))
    done = vlmoe(tmp_path, "finetune", "vqa.yaml")
    assert done.code == 2
    for word in ("init: ", "runs/base", "--set init=RUN", "--set init=scratch"):
        assert word in done.message
    assert not (tmp_path / "runs").exists()


def test_a_shipped_recipe_names_the_pretraining_that_it_needs(tmp_path: Path) -> None:
    assert "runs/quickstart-pretrain" in vlmoe(tmp_path, "finetune", "quickstart/vqa").message


def test_contrast_refuses_to_be_cut_into_micro_batches(work: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "run"))
    done = vlmoe(work, "finetune", "retrieval.yaml", "--set", "batch.micro.pair=4", *out)
    assert done.code == 2 and "2 micro-batches on 1 processes" in done.message
    assert not (tmp_path / "run").exists()


def test_the_model_of_the_command_line_and_json(work: Path, tmp_path: Path) -> None:
    """COCO -> Flickr30k: the second run starts from the first."""
    done = vlmoe(
        work, "finetune", "retrieval.yaml", "--model", "runs/retrieval", "--out", str(tmp_path / "run"), "--json"
    )
    told = done.data
    assert told["task"] == "retrieval" and told["folders"] == [str(tmp_path / "run")] and told["finished"] is True
    assert {row["metric"] for row in told["metrics"]} >= {"tr@1", "ir@10", "rsum", "mean"}
    assert told["broken"] == 0 and told["seconds"] > 0
    assert "left out of" not in done.err and "new, not from" not in done.err


@pytest.fixture(scope="module")
def seeds(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two seeds of a run."""
    folder = tmp_path_factory.mktemp("seeds")
    shutil.copytree(work / "runs" / "base", folder / "runs" / "base")
    (folder / "nli.yaml").write_text(recipe_text("nli", "runs/base"))
    done = vlmoe(folder, "finetune", "nli.yaml", "--seeds", "2")
    assert done.code == 0, done.err
    (folder / "out.txt").write_text(done.out)
    return folder


def test_seeds_have_folders_of_their_own(seeds: Path) -> None:
    run = seeds / "runs" / "nli"
    assert sorted(path.name for path in run.iterdir()) == ["seed-3", "seed-4"]
    for seed in (3, 4):
        assert f"\nseed: {seed}\n" in "\n" + (run / f"seed-{seed}" / "recipe.yaml").read_text()
    first, second = ((run / f"seed-{seed}" / "metrics.jsonl").read_text() for seed in (3, 4))
    losses = [json.loads(text.splitlines()[1])["loss/total"] for text in (first, second)]
    assert losses[0] != losses[1]


def test_seeds_are_told_with_mean_and_standard_deviation(seeds: Path) -> None:
    reached = []
    for seed in (3, 4):
        lines = (seeds / "runs" / "nli" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        reached.append([json.loads(line) for line in lines][-1]["metric/accuracy"])
    mean, spread = sum(reached) / 2, abs(reached[0] - reached[1]) / 2**0.5
    shown = (seeds / "out.txt").read_text()
    assert "held-out examples, 2 seeds" in shown
    assert ["metric", "mean", "standard deviation", "run 0", "run 1"] in list(rows_of(shown))
    cells = [f"{value:.4g}" for value in (mean, spread, *reached)]
    assert ["accuracy", *cells] in list(rows_of(shown))
    assert "runs/nli/seed-3, runs/nli/seed-4" in shown


def test_eval_finds_the_runs_of_seeds(seeds: Path) -> None:
    done = vlmoe(seeds, "eval", "nli", "--json")
    assert re.search(r"model runs/nli/seed-4/checkpoints/step-00000004, step 4; data\.test", done.err)
    assert done.data["n"] == 14


def test_going_on_with_a_finished_run_changes_nothing(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "runs" / "nli", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").read_text()
    assert vlmoe(work, "finetune", "nli.yaml", "--resume", "auto", "--out", str(tmp_path / "run")).code == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").read_text() == before
    refused = vlmoe(work, "finetune", "nli.yaml", "--out", str(tmp_path / "run"))
    assert refused.code == 2 and "--resume auto" in refused.message and "--overwrite" in refused.message


def test_a_signal_ends_the_run_and_says_how_to_go_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second step, of the first of two seeds; then the same command with --resume auto."""
    call = Stepper.__call__

    def hit(self: Stepper, step: int, *rest: Any) -> StepResult:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, step, *rest)

    typed = ("finetune", "nli.yaml", "--seeds", "2", "--out", str(tmp_path / "run"))
    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "__call__", hit)
        done = vlmoe(work, *typed)
    assert done.code == 128 + signal.SIGINT and done.out == ""
    goes_on = f"the same command with --resume auto goes on in {tmp_path / 'run' / 'seed-3'}"
    assert done.err.splitlines()[-1] == f"interrupted after step 2 of 4; {goes_on}"
    again = vlmoe(work, *typed, "--resume", "auto")
    assert again.code == 0 and "2 seeds" in again.out and "2 steps from step 2" in again.err
