import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmoe_core.checkpoint.owners import plan_shards
from vlmoe_core.checkpoint.shards import write_tensors
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.errors import CheckpointError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (4, 5), (2, 3, 7)])
def test_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    value = (raw % 2).bool().reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)
    write_tensors(tmp_path, "model", {"x": value}, 100)
    back = StoredTensors(tmp_path, "model")["x"]
    assert back.dtype == dtype and back.shape == value.shape and bits(back) == bits(value)


def test_negative_zero_and_nan_payload_survive(tmp_path: Path) -> None:
    value = torch.tensor([0x7FC00001, -0x80000000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    write_tensors(tmp_path, "model", {"x": value}, 100)
    assert bits(StoredTensors(tmp_path, "model")["x"]) == bits(value)


def test_views_that_are_not_contiguous_or_overlap(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "base": base,
        "turned": base.t(),
        "row": base[1],
        "overlap": base.flatten()[2:7],
        "wide": base[:1].expand(3, 4),
    }
    write_tensors(tmp_path, "model", state, 64)
    stored = StoredTensors(tmp_path, "model")
    assert set(stored) == set(state)
    assert all(torch.equal(stored[name], value) for name, value in state.items())


@pytest.mark.parametrize("limit", [1, 16, 40, 10_000])
def test_shards_keep_to_the_limit(tmp_path: Path, limit: int) -> None:
    state = {f"t{i}": torch.full((i,), float(i)) for i in range(1, 8)}
    write_tensors(tmp_path, "model", state, limit)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    for number, shard in enumerate(shards, start=1):
        assert shard.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held = load_file(shard)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
    assert {name for shard in shards for name in load_file(shard)} == set(state)


def test_plan_keeps_order_and_loses_nothing() -> None:
    assert plan_shards({"a": 3, "b": 4, "c": 20, "d": 1, "e": 9}, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards({}, 10) == []


def test_any_safetensors_reader_reads_it(tmp_path: Path) -> None:
    fused = torch.randn(3, 2)
    write_tensors(tmp_path, "model", {"a.experts.w": fused, "b": torch.ones(2)}, 8)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"a.experts.0.w", "a.experts.1.w", "a.experts.2.w", "b"}
    for key, shard in index["weight_map"].items():
        assert key in load_file(tmp_path / shard)
    assert torch.equal(load_file(tmp_path / index["weight_map"]["a.experts.2.w"])["a.experts.2.w"], fused[2])


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    shared, fused = torch.randn(4, 3), torch.randn(2, 3)
    state = {"embed": shared, "head": shared, "copy": shared.clone(), "a.experts.w": fused, "b.experts.w": fused}
    write_tensors(tmp_path, "model", state, 10_000)
    stored = StoredTensors(tmp_path, "model")
    assert stored.tied == {"head": "embed", "b.experts.0.w": "a.experts.0.w", "b.experts.1.w": "a.experts.1.w"}
    assert set(stored.infos) == {"embed", "copy", "a.experts.0.w", "a.experts.1.w"}
    assert all(torch.equal(stored[name], value) for name, value in state.items())


def test_shapes_without_reading(tmp_path: Path) -> None:
    write_tensors(tmp_path, "model", {"a.experts.w": torch.ones(1, 5), "b": torch.ones(2)}, 100)
    stored = StoredTensors(tmp_path, "model")
    assert (stored.shape("a.experts.w"), stored.shape("b"), stored.experts()) == ((1, 5), (2,), {"a.experts.w": 1})


@pytest.mark.parametrize("value", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()])
def test_refuses_tensors_without_plain_values(tmp_path: Path, value: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="'x' can't be saved"):
        write_tensors(tmp_path, "model", {"x": value}, 100)


def test_refuses_a_type_that_safetensors_has_not(tmp_path: Path) -> None:
    complex_values = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors can't be written"):
        write_tensors(tmp_path, "model", {"x": complex_values}, 100)
