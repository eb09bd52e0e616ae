"""Files of weights: what is read, and what is refused by name."""

import argparse
import fractions
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hub.importers import torch_files
from vlmoe_core.hub.importers.torch_files import open_source

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Code:
    """Runs when it is unpickled by anything that trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def same(found: Any, wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_holds_code_is_refused_and_nothing_runs(zipped: bool, tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.pth",
        {"model": STATE, "hook": Code(tmp_path / "ran")},
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=r"a\.pth is refused: it holds (posix|nt)\.system"):
        open_source(str(path))
    assert not (tmp_path / "ran").exists()


def test_any_other_class_is_refused_by_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model": STATE, "ratio": fractions.Fraction(1, 3)})
    with pytest.raises(CheckpointError, match=r"it holds fractions\.Fraction"):
        open_source(str(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_namespace_is_read(zipped: bool, tmp_path: Path) -> None:
    value = {"model": STATE, "args": argparse.Namespace(model="beit", lr=1e-3), "epoch": 7}
    source = open_source(str(saved(tmp_path / "a.pth", value, _use_new_zipfile_serialization=zipped)))
    assert same(source.tensors, STATE)
    assert set(source.aside) == {"(args)", "(epoch)"}


def test_a_namespace_stays_forbidden_elsewhere(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model": STATE, "args": argparse.Namespace(lr=1)})
    open_source(str(path))
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    state = {f"model.{key}": tensor for key, tensor in STATE.items()} | {"model.steps": 3}
    value = {
        "state_dict": state,
        "pytorch-lightning_version": "1.5.5",
        "hyper_parameters": {"config": {"image_size": 384}},
        "optimizer_states": [],
    }
    source = open_source(str(saved(tmp_path / "a.ckpt", value)))
    assert same(source.tensors, STATE) and source.prefix == "model."
    assert source.config == {"image_size": 384}
    assert source.aside["model.steps"] == "no tensor but a value (int)"
    assert source.aside["(optimizer_states)"] == "of the training, not of the model"


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda state: state, ""),
        (lambda state: {"model": state}, ""),
        (lambda state: {"module": {f"module.{key}": tensor for key, tensor in state.items()}, "lr": 1}, "module."),
        (lambda state: {f"module.model.{key}": tensor for key, tensor in state.items()}, "module.model."),
    ],
)
def test_other_wrappings(wrap: Callable[[Any], Any], prefix: str, tmp_path: Path) -> None:
    source = open_source(str(saved(tmp_path / "a.bin", wrap(STATE))))
    assert same(source.tensors, STATE) and source.prefix == prefix


@pytest.mark.parametrize("value", [torch.ones(2), {"epoch": 3}, [1, 2]])
def test_a_file_without_weights_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pth holds (no tensors by name|a \w+, not tensors by name)"):
        open_source(str(saved(tmp_path / "a.pth", value)))


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", STATE)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"a\.pth is (not a whole file of torch\.save|refused)"):
        open_source(str(path))


def edited(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**header, "a.weight": {**header["a.weight"], **changes}}


LIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "shape": lambda header: edited(header, shape=[20, 3]),
    "type": lambda header: edited(header, dtype="F64"),
    "past the end": lambda header: edited(header, data_offsets=[8, 5000]),
    "overlap": lambda header: edited(header, data_offsets=[0, 24]),
    "unknown type": lambda header: edited(header, dtype="X7"),
    "lost tensor": lambda header: {"a.bias": header["a.bias"]},
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_header_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    assert same(open_source(str(path)).tensors, STATE)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(LIES[lie](json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    with pytest.raises(CheckpointError, match="its header does not fit its bytes"):
        open_source(str(path))


@pytest.mark.parametrize("data", [b"", b"abc", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_no_header_at_all_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="its header does not fit its bytes"):
        open_source(str(tmp_path / "a.safetensors"))


def test_a_file_of_nothing_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors; name the file that holds the weights"):
        open_source(str(tmp_path / "a.safetensors"))


def folder_with(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "beit"} if config is None else config))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sharded", [True, False])
def test_folders(name: str, sharded: bool, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "theirs")
    write: Callable[[Any, Path], None] = save_file if name.endswith("safetensors") else torch.save
    if not sharded:
        write(STATE, folder / name)
    else:
        shards = {key: f"shard-{number}{Path(name).suffix}" for number, key in enumerate(STATE)}
        for key, shard in shards.items():
            write({key: STATE[key]}, folder / shard)
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": shards}))
    source = open_source(str(folder))
    assert same(source.tensors, STATE) and source.config == {"model_type": "beit"} and source.name == "theirs"
    assert len(source.hashes) == (2 if sharded else 1)


def test_folders_that_lack_something(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no config\.json, so it is no transformers folder"):
        open_source(str(tmp_path / "empty"))
    folder = folder_with(tmp_path / "theirs")
    with pytest.raises(UsageError, match=r"holds no weights; looked for model\.safetensors and pytorch_model\.bin"):
        open_source(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"lost\.safetensors is missing: model\.safetensors\.index\.json points"):
        open_source(str(folder))


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "theirs")
    for shard in ("1.safetensors", "2.safetensors"):
        save_file(STATE, folder / shard)
    index = {"weight_map": {"a.weight": "1.safetensors", "a.bias": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'a\.bias' is in two shards of .*, the second is 2\.safetensors"):
        open_source(str(folder))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file or folder; a model of the Hub is named hf-hub:ORG/NAME"):
        open_source(str(tmp_path / "absent.pth"))
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"unknown ending; weights are one of \*\.pth"):
        open_source(str(tmp_path / "a.onnx"))


@pytest.mark.parametrize("safe", [True, False])
def test_a_name_of_the_hub_is_fetched(safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = folder_with(tmp_path / "snapshot"), []

    def fetch(spec: str, patterns: tuple[str, ...]) -> Path:
        asked.append((spec, patterns[-1]))
        if safe and "model*.safetensors" in patterns:
            save_file(STATE, folder / "model.safetensors")
        if "pytorch_model*.bin" in patterns:
            torch.save(STATE, folder / "pytorch_model.bin")
        return folder

    monkeypatch.setattr(torch_files, "fetch_folder", fetch)
    source = open_source("hf-hub:org/beit@main")
    assert same(source.tensors, STATE) and source.name == "hf-hub:org/beit@main"
    wanted = ["model*.safetensors"] if safe else ["model*.safetensors", "pytorch_model*.bin"]
    assert asked == [("hf-hub:org/beit@main", pattern) for pattern in wanted]
