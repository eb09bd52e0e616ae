"""Every way in which a checkpoint can be wrong is refused, and the file or key is named."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.conftest import Sparse
from vlmoe_core.checkpoint.layout import latest_checkpoint
from vlmoe_core.checkpoint.manifest import FORMAT, dump_json, read_manifest, write_manifest
from vlmoe_core.checkpoint.read import read_checkpoint, read_newest
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_checkpoint
from vlmoe_core.errors import CheckpointError


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def reseal(folder: Path) -> None:
    """A manifest that vouches for whatever now lies in the folder, to reach the checks behind it."""
    write_manifest(folder, int(time.time()), {})


def first_shard(folder: Path, stem: str = "model") -> Path:
    return min(folder.glob(f"{stem}-00001-of-*.safetensors"))


def test_reads_what_was_written(checkpoint: Path, trained: tuple[Sparse, torch.optim.Optimizer]) -> None:
    found = read_checkpoint(checkpoint, verify="sha256")
    assert checkpoint.name == "step-00000100"
    assert found.state == RunState(step=100, positions={"pair": 800}, recipe="toy")
    assert found.recipe_text == "seed: 0\n"
    assert (found.tokenizers / "text" / "tokenizer.json").read_text() == '{"model": "words"}'
    assert {"torch", "safetensors", "python"} <= set(found.versions)
    state = trained[0].state_dict()
    assert set(found.model) == set(state)
    assert all(torch.equal(found.model[name], value) for name, value in state.items())


def test_layout_on_disk(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == {
        "manifest.json",
        "model.safetensors.index.json",
        "optim.safetensors.index.json",
        "recipe.yaml",
        "state.json",
        "tokenizers",
    }
    assert len([name for name in shards if name.startswith("model-")]) > 1
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert set(manifest["files"]) == names - {"manifest.json", "tokenizers"} | {"tokenizers/text/tokenizer.json"}


def test_no_file_is_a_pickle(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:2]
            assert start[:1] != b"\x80" and start != b"PK", path
            assert path.suffix in {".json", ".yaml", ".safetensors"}


def test_any_flipped_bit_is_refused_by_name(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in files:
        size = path.stat().st_size
        for byte in sorted({0, min(8, size - 1), size // 3, size // 2, size - 1}):
            before = path.read_bytes()
            flip(path, byte, bit=byte % 8)
            with pytest.raises(CheckpointError, match=path.name):
                read_checkpoint(checkpoint, verify="sha256")
            path.write_bytes(before)
    read_checkpoint(checkpoint, verify="sha256")


def test_every_bit_of_the_manifest_counts(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    before = path.read_bytes()
    for byte in range(0, len(before), 29):
        flip(path, byte, bit=byte % 8)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(checkpoint)
        path.write_bytes(before)


def test_small_files_and_headers_are_checked_without_sha256(checkpoint: Path) -> None:
    for path in (checkpoint / "state.json", checkpoint / "recipe.yaml", first_shard(checkpoint)):
        before = path.read_bytes()
        flip(path, min(20, len(before) - 1))
        with pytest.raises(CheckpointError, match=path.name):
            read_checkpoint(checkpoint, verify="sizes")
        path.write_bytes(before)


def test_missing_file(checkpoint: Path) -> None:
    shard = first_shard(checkpoint, "optim")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["notes.txt", "model-00009-of-00009.safetensors", "tokenizers/extra.json", "evil.pkl"])
def test_foreign_file(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(b"?")
    with pytest.raises(CheckpointError, match=f"{name} does not belong"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_truncated_shard(checkpoint: Path, keep: int) -> None:
    shard = first_shard(checkpoint)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{shard.name} has {shard.stat().st_size} bytes instead"):
        read_checkpoint(checkpoint)
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a whole safetensors file"):
        read_checkpoint(checkpoint)


def test_header_that_lies_about_a_shape(checkpoint: Path) -> None:
    shard = first_shard(checkpoint)
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode()
    lie = header.replace("[11,4]", "[4,11]")
    assert lie != header
    shard.write_bytes(data[:8] + lie.encode() + data[8 + length :])
    with pytest.raises(CheckpointError, match=f"{shard.name} has a header that is not the one"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(("old", "new"), [("[11,4]", "[11,9]"), ('"F32"', '"F64"'), ("[0,", "[8,")])
def test_header_that_contradicts_itself(checkpoint: Path, old: str, new: str) -> None:
    shard = first_shard(checkpoint)
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode()
    assert old in header
    shard.write_bytes(data[:8] + header.replace(old, new).encode() + data[8 + length :])
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=shard.name):
        read_checkpoint(checkpoint)


def test_index_that_points_to_a_missing_key(checkpoint: Path) -> None:
    shard = first_shard(checkpoint)
    held = load_file(shard)
    lost = min(held)
    del held[lost]
    save_file(held | {"other": torch.ones(1)}, shard)
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=f"'{lost}' is missing in .*{shard.name}"):
        read_checkpoint(checkpoint)


def test_key_that_the_index_does_not_list(checkpoint: Path) -> None:
    shard = first_shard(checkpoint)
    save_file(load_file(shard) | {"other": torch.ones(1)}, shard)
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=f"{shard.name} holds 'other'"):
        read_checkpoint(checkpoint)


def edit_index(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(dump_json(index))
    reseal(folder)


def test_missing_expert(checkpoint: Path) -> None:
    key = "ffn.experts.1.up.weight"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard = checkpoint / index["weight_map"][key]
    held = load_file(shard)
    del held[key]
    assert held, "the shard holds more than this expert"
    save_file(held, shard)
    edit_index(checkpoint, lambda index: index["weight_map"].pop(key))
    with pytest.raises(CheckpointError, match=f"'{key}' is missing"):
        read_checkpoint(checkpoint)


def test_index_that_names_no_shard_or_no_owner(checkpoint: Path) -> None:
    copy = shutil.copytree(checkpoint, checkpoint.parent.parent / "copy")
    edit_index(checkpoint, lambda index: index["weight_map"].update({"x": "model-00099-of-00099.safetensors"}))
    with pytest.raises(CheckpointError, match=r"model-00099-of-00099\.safetensors is missing"):
        read_checkpoint(checkpoint)
    edit_index(copy, lambda index: index["metadata"].update(tied={"x": "nowhere"}))
    with pytest.raises(CheckpointError, match=r"'x' .* tied to 'nowhere'"):
        read_checkpoint(copy)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {"x": 1}, "metadata": {"tied": {}}}', "\xff"])
def test_index_that_is_none(checkpoint: Path, text: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is not an index"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"step": "100"}, "step"),
        ({"extra": 1}, "extra"),
        ({"positions": None}, "positions"),
        ({"metrics_offset": 1.5}, "metrics_offset"),
    ],
)
def test_state_that_does_not_fit(checkpoint: Path, change: dict[str, object], where: str) -> None:
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=f"state.json does not hold the state of a run: {where}"):
        read_checkpoint(checkpoint)


def test_newer_format_is_refused_by_name(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}, this vlmoe reads {FORMAT}"):
        read_checkpoint(checkpoint)


def test_folder_without_a_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint: it has no manifest\.json"):
        read_checkpoint(checkpoint)


def test_renamed_step_is_refused_but_a_copy_may_have_any_name(checkpoint: Path) -> None:
    copy = shutil.copytree(checkpoint, checkpoint.parent.parent / "my-model")
    assert read_checkpoint(copy).state.step == 100
    with pytest.raises(CheckpointError, match="holds step 100"):
        read_checkpoint(checkpoint.rename(checkpoint.with_name("step-00000200")))


def test_a_damaged_checkpoint_is_never_passed_over(save: Callable[[int], Path]) -> None:
    earlier, newest = save(100), save(200)
    run = newest.parent.parent
    assert latest_checkpoint(run) == newest == read_newest(newest).path
    flip(first_shard(newest), -1)
    with pytest.raises(CheckpointError, match=f"step-00000200.*--resume {earlier}"):
        read_newest(newest)
    shutil.rmtree(earlier)
    with pytest.raises(CheckpointError, match="--overwrite"):
        read_newest(newest)
    shutil.rmtree(newest)
    assert latest_checkpoint(run) is None


def test_state_keeps_every_number(tmp_path: Path) -> None:
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    state = RunState(
        step=3,
        positions={"image": 2**53 + 1, "text": 0},
        scaler=scaler,
        best_score=0.1 + 0.2,
        best_step=2,
        metrics_offset=12345,
        recipe="é",
    )
    path = write_checkpoint(tmp_path, {}, {}, state, "", lambda folder: None)
    found = read_checkpoint(path, verify="sha256")
    assert found.state == state
    assert [type(v) for v in (found.state.scaler or {}).values()].count(int) == 2
    assert len(found.model) == len(found.optimizer) == 0


def test_state_refuses_infinity(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can't be written to state\.json"):
        write_checkpoint(tmp_path, {}, {}, RunState(step=1, positions={}, best_score=float("inf")), "", lambda f: None)
