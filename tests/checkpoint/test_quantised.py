"""Quantised tensors on disk: what is written, and what a reader is given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmoe_core.checkpoint.quantised import QuantisedTensors, dequantise, dequantised
from vlmoe_core.checkpoint.shards import write_tensors
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.stored import StoredTensors, pieces, shape_of
from vlmoe_core.checkpoint.summary import inspect_checkpoint
from vlmoe_core.checkpoint.write import write_model
from vlmoe_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FUSED = "a.experts.up.weight"


def tensors() -> QuantisedTensors:
    """A matrix, a layer of three experts, and what is not quantised though its name or type is alike."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {
        FUSED: torch.randint(-127, 128, (3, 4, 5), dtype=torch.int8),
        f"{FUSED}_scale": torch.rand(3, 4),
        "a.experts.up.bias": torch.rand(3, 4),
        "head.weight": torch.randint(-127, 128, (2, 6), dtype=torch.int8),
        "head.weight_scale": torch.rand(2),
        "codes": torch.randint(-127, 128, (2, 6), dtype=torch.int8),
        "codes_scale": torch.rand(2),
    }
    return QuantisedTensors(state, frozenset({FUSED, "head.weight"}))


def written(folder: Path, state: Any, limit: int = 64) -> StoredTensors:
    write_tensors(folder, "model", state, limit)
    return StoredTensors(folder, "model")


def test_on_disk_each_expert_has_its_numbers_and_its_scales(tmp_path: Path) -> None:
    state = tensors()
    write_tensors(tmp_path, "model", state, 64)
    index = json.loads((tmp_path / INDEX).read_text())
    held = {
        key: tensor
        for shard in set(index["weight_map"].values())
        for key, tensor in load_file(tmp_path / shard).items()
    }
    assert set(held) == {
        *(f"a.experts.{e}.up.{part}" for e in range(3) for part in ("weight", "weight_scale", "bias")),
        *("head.weight", "head.weight_scale", "codes", "codes_scale"),
    }
    assert torch.equal(held["a.experts.2.up.weight"], state[FUSED][2])
    assert torch.equal(held["a.experts.2.up.weight_scale"], state[f"{FUSED}_scale"][2])
    assert index["metadata"]["quantised"] == [*(f"a.experts.{e}.up.weight" for e in range(3)), "head.weight"]


def test_a_reader_is_given_the_product_and_no_scales(tmp_path: Path) -> None:
    state = tensors()
    stored = written(tmp_path, state)
    assert set(stored) == {FUSED, "a.experts.up.bias", "head.weight", "codes", "codes_scale"}
    for name in (FUSED, "head.weight"):
        wanted = state[name].double() * state[f"{name}_scale"].double()[..., None]
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], wanted.float())  # the product of int8 and float32 is exact in float64
    for name in ("codes", "codes_scale", "a.experts.up.bias"):
        assert stored[name].dtype == state[name].dtype and torch.equal(stored[name], state[name])
    assert stored.quantised == state.quantised
    loaded = dequantised(state)
    assert set(loaded) == set(stored) and all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_piece_by_piece(tmp_path: Path) -> None:
    stored = written(tmp_path, tensors())
    assert shape_of(stored, FUSED) == (3, 4, 5) and stored.experts() == {FUSED: 3, "a.experts.up.bias": 3}
    found = {piece.row: piece.tensor for piece in pieces(stored, {FUSED: (range(3), range(4), range(5))})}
    assert list(found) == [0, 1, 2]
    assert torch.equal(torch.stack(list(found.values())), stored[FUSED])
    assert [piece.row for piece in pieces(stored, {"head.weight": (range(2), range(6))})] == [None]


def test_a_part_of_a_tensor_has_the_scales_of_its_channels(tmp_path: Path) -> None:
    stored = written(tmp_path, tensors())
    (expert,) = pieces(stored, {FUSED: (range(1, 2), range(2, 4), range(3))})
    assert expert.row == 0 and torch.equal(expert.tensor, stored[FUSED][1, 2:4, :3])
    (rows,) = pieces(stored, {"head.weight": (range(1, 2), range(6))})
    assert torch.equal(rows.tensor, stored["head.weight"][1:])


def test_a_tied_tensor_is_written_once_and_quantised_under_both_names(tmp_path: Path) -> None:
    numbers, scale = torch.randint(-127, 128, (2, 3), dtype=torch.int8), torch.rand(2)
    state = {"x.weight": numbers, "x.weight_scale": scale, "y.weight": numbers, "y.weight_scale": scale}
    state_of = QuantisedTensors(state, frozenset({"x.weight", "y.weight"}))
    stored = written(tmp_path, state_of)
    assert set(stored) == {"x.weight", "y.weight"} and set(stored.infos) == {"x.weight", "x.weight_scale"}
    assert stored.tied == {"y.weight": "x.weight", "y.weight_scale": "x.weight_scale"}
    assert torch.equal(stored["x.weight"], dequantise(numbers, scale))
    assert torch.equal(stored["y.weight"], stored["x.weight"])
    loaded = dequantised(state_of)
    assert loaded["x.weight"] is loaded["y.weight"]


def test_infos_and_summary_tell_the_int8(tmp_path: Path) -> None:
    state = tensors()
    folder = write_model(tmp_path / "m", state, RunState(3, {}), "seed: 0\n", lambda folder: None)
    info = StoredTensors(folder, "model").infos["a.experts.1.up.weight"]
    assert (info.dtype, info.shape, info.nbytes) == ("I8", (4, 5), 20)
    summary = inspect_checkpoint(folder)
    assert {group.dtype: group.values for group in summary.groups} == {"I8": 60 + 12 + 12, "F32": 12 + 12 + 2 + 2}
    assert summary.parameters == sum(t.numel() for t in dequantised(state).values())


def test_a_plain_state_records_nothing(tmp_path: Path) -> None:
    stored = written(tmp_path, tensors().tensors)
    assert "quantised" not in json.loads((tmp_path / INDEX).read_text())["metadata"]
    assert stored.quantised == frozenset() and stored[FUSED].dtype == torch.int8 and f"{FUSED}_scale" in stored


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        (["a.experts.up.bias"], "'a.experts.up.bias' is missing"),
        (["a.experts.0.up.bias"], r"'a.experts.0.up.bias_scale' is missing in .*, where 'a.experts.0.up.bias' is"),
        (["codes_scale"], "'codes_scale_scale' is missing"),
        (["a.experts.0.up.weight"], r"'a.experts.0.up.weight_scale' is missing: there are experts up to 2"),
        (["floats"], r"'floats' in .* is not quantised as the index says: it is TensorInfo\(dtype='F32'"),
        (["short"], "'short' in .* is not quantised as the index says"),
        ("head.weight", "metadata.quantised must be a list of names"),
        ([3], "metadata.quantised must be a list of names"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, quantised: Any, message: str) -> None:
    more = {
        "floats": torch.rand(2, 2),
        "floats_scale": torch.rand(2),
        "short": torch.ones(2, 3, dtype=torch.int8),
        "short_scale": torch.rand(3),
    }
    write_tensors(tmp_path, "model", {**tensors().tensors, **more}, 10_000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["metadata"]["quantised"] = quantised
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        StoredTensors(tmp_path, "model")


def test_a_layer_with_some_quantised_experts_is_refused(tmp_path: Path) -> None:
    shard, numbers = "model-00001-of-00001.safetensors", torch.ones(2, 3, dtype=torch.int8)
    held = {"a.experts.0.w": numbers, "a.experts.0.w_scale": torch.ones(2), "a.experts.1.w": numbers.clone()}
    save_file(held, tmp_path / shard)
    index = {"metadata": {"tied": {}, "quantised": ["a.experts.0.w"]}, "weight_map": dict.fromkeys(held, shard)}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'a.experts.1.w' in .* is not quantised, but other experts are"):
        StoredTensors(tmp_path, "model")
