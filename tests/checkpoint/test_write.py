"""A crash at any moment of a save leaves the earlier checkpoints whole, and no half one with a final name."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmoe_core.checkpoint import files
from vlmoe_core.checkpoint.layout import list_checkpoints, prune
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_checkpoint
from vlmoe_core.errors import CheckpointError


def write(run: Path, step: int) -> Path:
    model = {"w": torch.full((40,), float(step)), "l.experts.w": torch.full((2, 8), float(step))}
    moments = {"exp_avg.w": torch.full((40,), -float(step))}
    state = RunState(step=step, positions={"pair": step})
    return write_checkpoint(run, model, moments, state, "seed: 0\n", lambda f: None, max_shard_bytes=100)


def assert_whole(run: Path, steps: list[int]) -> None:
    found = [read_checkpoint(path, verify="sha256") for path in list_checkpoints(run)]
    assert [checkpoint.state.step for checkpoint in found] == steps
    for checkpoint in found:
        assert torch.equal(checkpoint.model["w"], torch.full((40,), float(checkpoint.state.step)))


def fork(work: Callable[[], object]) -> int:
    """Start work in a forked process, which has torch loaded already; its process number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_after(seconds: float, work: Callable[[], object]) -> None:
    """Kill work in the middle of what it does."""
    child = fork(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it failed by itself before the kill"


def dying_at(call: int) -> Callable[..., None]:
    """A stand-in for a step towards the disk at which the process is killed, the n-th time."""
    left = [call]

    def die_or(step: Callable[[], object]) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        step()

    return die_or


def kill_at(call: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Whether the child was killed at its n-th sync, rename or removal; False: it ended before there were so many."""

    def patched() -> None:
        die_or = dying_at(call)
        fsync, rename, unlink = os.fsync, Path.rename, os.unlink
        monkeypatch.setattr(os, "fsync", lambda descriptor: die_or(lambda: fsync(descriptor)))
        monkeypatch.setattr(Path, "rename", lambda self, target: die_or(lambda: rename(self, target)))
        monkeypatch.setattr(os, "unlink", lambda *a, **k: die_or(lambda: unlink(*a, **k)))
        work()

    status = os.waitpid(fork(patched), 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WIFSIGNALED(status)


def test_kill_at_every_step_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    call = 1
    while kill_at(call, monkeypatch, lambda: write(tmp_path, 2)):
        whole = [1, 2] if (tmp_path / "checkpoints" / "step-00000002").exists() else [1]
        assert_whole(tmp_path, whole)
        prune(tmp_path, keep_last=1, best_step=1)
        for path in list_checkpoints(tmp_path)[1:]:
            files.remove_folder(path)
        call += 1
    assert call > 12, "every file, folder and rename is a step"
    assert_whole(tmp_path, [1, 2])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_kill_at_every_step_of_a_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = 0
    killed = True
    while killed:
        call += 1
        for step in (1, 2):
            write(tmp_path, step)
        killed = kill_at(call, monkeypatch, lambda: prune(tmp_path, keep_last=1, best_step=None))
        whole = [1, 2] if (tmp_path / "checkpoints" / "step-00000001").exists() else [2]
        assert_whole(tmp_path, whole)
    assert call > 8
    assert_whole(tmp_path, [2])


def test_kill_at_random_moments(tmp_path: Path) -> None:
    write(tmp_path, 1)
    start = time.monotonic()
    assert os.waitpid(fork(lambda: write(tmp_path, 2)), 0)[1] == 0
    one_save = time.monotonic() - start  # as slow as the first of a process that was forked from a large one
    draw = random.Random(0)
    kills = 0
    while len(list_checkpoints(tmp_path)) < 5:
        before = len(list_checkpoints(tmp_path))
        kill_after(
            draw.uniform(0, 3 * one_save), lambda first=before + 1: [write(tmp_path, s) for s in range(first, 99)]
        )
        after = list_checkpoints(tmp_path)
        assert len(after) >= before
        assert_whole(tmp_path, list(range(1, len(after) + 1)))
        kills += 1
        assert kills < 200, "no save ever ended"


def test_every_file_and_folder_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = files.sync, Path.rename
    monkeypatch.setattr(files, "sync", lambda path: (events.append(str(path)), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target)))
    path = write(tmp_path, 1)
    at = events.index("rename")
    partial = f"{path}{files.PARTIAL}"
    wanted = {partial, *(f"{partial}/{p.relative_to(path)}" for p in path.rglob("*"))}
    assert set(events[:at]) == wanted
    assert events[at + 1 :] == [str(path.parent)]


def test_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .*No space left"):
            write(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert_whole(tmp_path, [1])


def test_next_save_clears_leftovers(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for name in ("step-00000002.partial", "step-00000001.removed"):
        (path.parent / name).mkdir()
        (path.parent / name / "half").write_text("half")
    assert list_checkpoints(tmp_path) == [path]
    write(tmp_path, 3)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-00000001", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "damage").write_text("x")
    assert write(tmp_path, 1) == path
    assert_whole(tmp_path, [1])
    assert [p.name for p in path.parent.iterdir()] == ["step-00000001"]


def test_tokenizers_may_be_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "tokenizers"
    (source / "visual").mkdir(parents=True)
    (source / "visual" / "codes.json").write_text("[1]")
    path = write_checkpoint(tmp_path / "run", {}, {}, RunState(step=0, positions={}), "", source)
    assert (read_checkpoint(path, verify="sha256").tokenizers / "visual" / "codes.json").read_text() == "[1]"


def test_only_one_shard_more_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    clone = torch.Tensor.clone

    def counted(tensor: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append(tensor.nbytes)
        return clone(tensor, **kwargs)

    from vlmoe_core.checkpoint import shards

    write_tensor_file = shards.write_tensor_file
    held: list[int] = []

    def measured(*args: Any) -> None:
        held.append(sum(seen))
        seen.clear()
        write_tensor_file(*args)

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    monkeypatch.setattr(shards, "write_tensor_file", measured)
    rows = torch.ones(9, 10)
    shards.write_tensors(tmp_path, "views", {f"t{i}": row for i, row in enumerate(rows)}, 100)
    assert held == [80, 80, 80, 80, 40]
    held.clear()
    shards.write_tensors(tmp_path, "own", {f"t{i}": torch.ones(10) for i in range(9)}, 100)
    assert held == [0] * 5, "what lies in memory as it does in the file is not copied"
