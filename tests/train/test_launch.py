"""Several processes as a user starts them: our launcher and torchrun, with real commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.train.support import free_port, metrics, tiny
from vlmoe_core.checkpoint.layout import list_checkpoints
from vlmoe_core.errors import TrainError, UsageError
from vlmoe_core.train.config import TrainConfig
from vlmoe_core.train.launch import PATIENCE, WATCHER, launch
from vlmoe_core.train.parallel import build_accelerator

LAUNCH = "import sys; from vlmoe_core.train.launch import launch; sys.exit(launch(2, sys.argv[1:]))"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def texts_only(folder: Path, steps: int) -> Path:
    """The file of a recipe that starts fast: no image at all."""
    texts = "{text: [{source: scenes, size: 50}]}"
    batch = "batch={size: {text: 4}, micro: {text: 2}}"
    overrides = (f"data.train={texts}", f"data.eval={texts}", batch, f"train.steps={steps}", "train.keep_last=99")
    path = folder / "texts.yaml"
    path.write_text(tiny(folder, *overrides).text)
    return path


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def test_ctrl_c_ends_all_processes_with_a_checkpoint(tmp_path: Path) -> None:
    recipe, run = texts_only(tmp_path, steps=2000), tmp_path / "run"
    command = [sys.executable, "-c", LAUNCH, "pretrain", str(recipe), "--out", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes)  # type: ignore[call-overload]
    wait_for(run / "checkpoints" / "step-00000004", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors and WATCHER not in errors.replace("/", ".")
    last = json.loads((list_checkpoints(run)[-1] / "state.json").read_text())["step"]
    trained = [line["step"] for line in metrics(run) if line["split"] == "train"]
    assert trained == list(range(1, last + 1)) and 4 <= last < 2000


def test_a_killed_process_ends_the_run_with_one_last_line(tmp_path: Path) -> None:
    """The launcher waits for none that was asked to end: ten minutes are for a checkpoint after Ctrl-C."""
    recipe, run = texts_only(tmp_path, steps=2000), tmp_path / "run"
    command = [sys.executable, "-m", "vlmoe_cli", "pretrain", str(recipe), "--out", str(run), "--num-processes", "2"]
    command += ["--set", "parallel.expert=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes)  # type: ignore[call-overload]
    wait_for(run / "checkpoints" / "step-00000004", process)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and process.returncode == 1, errors
    assert "Traceback" not in errors and "internal error" not in errors and WATCHER not in errors.replace("/", ".")
    lines = errors.strip().splitlines()
    assert lines[-1].startswith("error: process 1 (of 2, counted from 0) was ended by SIGKILL"), errors
    assert lines[-1].endswith("--resume auto, on any number of processes that fits")
    assert any(line.startswith("error: process 0 (of 2, counted from 0) can't go on: ") for line in lines), errors
    assert not ranks["0"].is_running()


def test_torchrun_trains_one_run_on_two_processes(tmp_path: Path) -> None:
    recipe, run = texts_only(tmp_path, steps=2), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "vlmoe_cli", "pretrain", str(recipe), "--out", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert [(line["split"], line["step"]) for line in metrics(run)] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2),
    ]  # fmt: skip
    assert "broadcast_buffers" not in done.stderr


def test_what_all_processes_refuse_is_told_once_with_their_exit_code(tmp_path: Path) -> None:
    """What was typed can't be done: 2."""
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", LAUNCH, "pretrain", str(texts_only(tmp_path, steps=2)), "--out", str(tmp_path)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2 and time.monotonic() - started < 60
    assert done.stderr == f"error: {tmp_path} holds files that are no run; choose an empty folder with --out\n"


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({1: (2, 7), 0: (-9, 40)}, 2),  # the one that was too slow to end was killed by the launcher
        ({0: (-15, 7), 1: (1, 7)}, 1),
        ({0: (-15, 7)}, 143),
        ({0: (1, 9), 1: (-9, 7)}, "process 1 (of 2, counted from 0) was ended by SIGKILL"),
    ],
)
def test_what_a_failed_run_says_is_of_the_process_that_failed_first(
    monkeypatch: pytest.MonkeyPatch, ends: dict[int, tuple[int, int]], code: int | str
) -> None:
    """Exit code and second of each process that failed, by rank."""
    monkeypatch.setenv(PATIENCE, "1")
    failures = {rank: ProcessFailure(rank, 100 + rank, exit_code, "") for rank, (exit_code, _) in ends.items()}
    for rank, (_, second) in ends.items():
        failures[rank].timestamp = second

    def failed(*_: object) -> None:
        raise ChildFailedError("vlmoe_cli", failures)

    monkeypatch.setattr("vlmoe_core.train.launch.launch_command", failed)
    if isinstance(code, int):
        assert launch(2, ["pretrain", "x"]) == code
        return
    with pytest.raises(TrainError, match=re.escape(code)):
        launch(2, ["pretrain", "x"])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"--num-processes 3, but this machine has 1 GPU\(s\); give 1 or less"):
        launch(3, ["pretrain", "x"])


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accelerate alone finds no backend on a CPU under torchrun and says nothing: each would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("vlmoe_core.train.parallel.meets_on_cpu", lambda: False)
    with pytest.raises(TrainError, match=r"2 processes were started \(WORLD_SIZE\), but each would train alone"):
        build_accelerator(TrainConfig(steps=1))
