import time
from pathlib import Path

import pytest
import torch

from tests.checkpoint.conftest import DIM, HIDDEN, NUM_EXPERTS, WORDS
from vlmoe_core.checkpoint.manifest import write_manifest
from vlmoe_core.checkpoint.summary import inspect_checkpoint, verify_checkpoint
from vlmoe_core.errors import CheckpointError


def test_inspect_counts(checkpoint: Path) -> None:
    summary = inspect_checkpoint(checkpoint)
    weights = WORDS * DIM + 2 * NUM_EXPERTS * DIM * HIDDEN + NUM_EXPERTS * HIDDEN + 2 * DIM
    assert (summary.step, summary.format, summary.recipe) == (100, 1, "toy")
    assert summary.parameters == weights + 3, "the tied head once, the buffer of three too"
    assert summary.bytes == sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file())
    assert summary.experts == {"ffn": NUM_EXPERTS}
    found = {(g.part, g.dtype): (g.tensors, g.values, g.bytes) for g in summary.groups}
    assert found[("model", "F32")] == (3 + 3 * NUM_EXPERTS, weights, 4 * weights)
    assert found[("model", "I64")] == (1, 3, 24)
    assert found[("optim", "F32")] == (6 + 6 * NUM_EXPERTS + 6, 2 * weights + 6, 4 * (2 * weights + 6))
    assert abs(summary.created - time.time()) < 60


def test_verify_reports_every_file(checkpoint: Path) -> None:
    reports = verify_checkpoint(checkpoint)
    assert {r.name for r in reports} == {
        p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    assert all(report.problem is None for report in reports)


def test_verify_goes_on_after_a_failure(checkpoint: Path) -> None:
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()
    (checkpoint / "foreign").write_text("?")
    broken = {r.name: r.problem for r in verify_checkpoint(checkpoint) if r.problem}
    assert set(broken) == {shards[0].name, shards[1].name, "foreign"}
    assert "SHA-256" in broken[shards[0].name] and broken[shards[1].name] == "is missing"


def test_verify_compares_index_and_shards(checkpoint: Path) -> None:
    shard = min(checkpoint.glob("model-*.safetensors"))
    shard.unlink()
    write_manifest(checkpoint, 0, {})
    problems = [r.problem for r in verify_checkpoint(checkpoint) if r.problem]
    assert len(problems) == 1 and f"{shard.name} is missing" in problems[0]


def test_verify_needs_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        verify_checkpoint(tmp_path)


def test_inspect_reads_no_tensor(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> torch.Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("vlmoe_core.checkpoint.stored.StoredTensors._load", refuse)
    inspect_checkpoint(checkpoint)
