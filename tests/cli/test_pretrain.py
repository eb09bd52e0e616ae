"""`vlmoe pretrain` and `vlmoe predict masked` as they are typed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.tasks_support import vlmoe
from tests.train.support import RECIPE
from vlmoe_cli.progress import health_of, losses_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished run in runs/tiny."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "vlmoe_cli", "pretrain", "tiny.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_the_closing_table_compares_with_the_start_and_the_baseline(folder: Path) -> None:
    shown = (folder / "stdout.txt").read_text()
    for part in ("mlm", "mim", "vlm_text", "vlm_image"):
        numbers = re.search(rf"^{part} +([\d.]+) +([\d.]+) +([\d.]+)$", shown, re.MULTILINE)
        assert numbers, shown
    assert "unigram baseline" in shown
    assert 'vlmoe predict masked --model runs/tiny --text "a red [MASK] left of a circle"' in shown


def test_plain_lines_go_to_stderr_with_losses_and_health(folder: Path) -> None:
    told = (folder / "stderr.txt").read_text()
    assert "text tokenizer: WordPiece fitted" in told and "held-out at step 0" in told
    assert re.search(
        r"^step 6/6 .*mlm [\d.]+.* samples/s, 0:00:00 left .*vision: busiest \d+%, dead \d", told, re.MULTILINE
    )
    assert "saved runs/tiny/checkpoints/step-00000006" in told


def test_the_run_folder_holds_what_it_should(folder: Path) -> None:
    run = folder / "runs" / "tiny"
    assert {"recipe.yaml", "metrics.jsonl", "environment.json", "checkpoints", "tokenizers"} <= {
        path.name for path in run.iterdir()
    }
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["split"] == "eval" and first["baseline/mlm"] > 0


def test_a_second_run_in_the_same_folder_is_refused(folder: Path) -> None:
    again = vlmoe(folder, "pretrain", "tiny.yaml")
    assert again.code == 2 and "--resume auto" in again.message and "--overwrite" in again.message


def test_what_no_process_can_do_is_said_once(folder: Path) -> None:
    done = vlmoe(folder, "pretrain", "tiny.yaml", "--num-processes", "3", "--out", "runs/none")
    message = "error: 2 micro-batches a step (batch.size / batch.micro) can't be dealt to 3 processes"
    assert done.code == 2 and done.err.startswith(message) and done.err.count("\n") == 1
    assert not (folder / "runs" / "none").exists()


def test_json_is_one_document(folder: Path) -> None:
    done = vlmoe(folder, "pretrain", "tiny.yaml", "--set", "train.steps=2", "--out", "runs/json", "--json")
    result = done.data
    assert result["finished"] is True and result["step"] == 2
    assert {row["loss"] for row in result["losses"]} == {"mlm", "mim", "vlm_text", "vlm_image"}


def test_predict_finds_the_newest_run_by_itself(folder: Path) -> None:
    done = vlmoe(folder, "predict", "masked", "--text", "a red [MASK]", "--model", "runs/tiny", "--json")
    assert len(done.data["masks"]) == 5
    by_default = vlmoe(folder, "predict", "masked", "--text", "a red [MASK]")
    assert by_default.code == 0 and "model runs/" in by_default.err


def test_predict_without_a_run_names_the_command_that_makes_one(tmp_path: Path) -> None:
    done = vlmoe(tmp_path, "predict", "masked", "--text", "a red [MASK]")
    assert done.code == 2 and "vlmoe pretrain quickstart/pretrain" in done.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_and_says_how_to_go_on(folder: Path, number: signal.Signals) -> None:
    out = f"runs/{number.name}"
    command = [sys.executable, "-m", "vlmoe_cli", "pretrain", "tiny.yaml", "--set", "train.steps=5000", "--out", out]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = re.search(r"Interrupted after step (\d+) of 5000", stdout)
    assert step and f"--resume {out}" in stdout
    assert (folder / out / "checkpoints" / f"step-{int(step[1]):08d}" / "manifest.json").exists()
    assert "Traceback" not in stderr


def test_health_takes_the_worst_layer_of_a_modality() -> None:
    record = {
        f"router/vision/{layer}/{figure}": value
        for layer, values in ((1, (0.5, 0.0, 0.1, 1.0)), (3, (0.2, 2.0, 0.3, 0.5)))
        for figure, value in zip(("busiest", "dead", "dropped", "entropy"), values, strict=True)
    }
    assert health_of(record) == {"vision": {"busiest": 0.5, "dead": 2.0, "dropped": 0.3, "entropy": 0.5}}
    assert losses_of({"loss/total": 3.0, "loss/mlm": 1.0, "lr": 0.1}) == {"mlm": 1.0}
