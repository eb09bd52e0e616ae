"""Reads other people's weights: .pth, .pt, .bin, .ckpt, .safetensors, or a transformers folder; never runs code."""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmoe_core.checkpoint.files import sha256
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hf import HUB_PREFIX, fetch_folder, is_hub

SMALL = ("*.json", "*.txt", "*.model", "*.spm")
"""What is fetched of a repository on the Hub beside its weights."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What a transformers folder holds, the preferred first; sharded ones have an index of the same name."""
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("module.", "model.", "_orig_mod.")
"""What DistributedDataParallel, Lightning and torch.compile put before every key."""
STATES = ("state_dict", "module", "model")
"""Where a training program keeps the weights: Lightning, DeepSpeed, timm. The first that is there is read."""
FOREIGN = re.compile(r"GLOBAL ([\w.]+)")
"""How torch names a class that it refuses to load."""


@dataclass(frozen=True)
class Source:
    """Somebody else's weights."""

    name: str
    """Name of the file or folder, or on the Hub."""
    hashes: Mapping[str, str]
    """SHA-256 of each file of weights."""
    tensors: Mapping[str, Tensor]
    """By the keys of the source, `prefix` left out."""
    prefix: str = ""
    """What all keys of the file begin with."""
    aside: Mapping[str, str] = field(default_factory=dict)
    """Other entries of the file, and why they are not used."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json of a folder; the hyperparameters of a Lightning checkpoint."""
    folder: Path | None = None
    """The transformers folder."""


def open_source(spec: str) -> Source:
    """Read a file, a transformers folder, or `hf-hub:ORG/NAME[@rev]`.

    Raises:
        UsageError: there is no such thing, or it is nothing that holds weights.
        CheckpointError: it is damaged, or holds anything but tensors and plain values.
        HubError: the Hub refuses, or can't be reached.
    """
    if is_hub(spec):
        return _open_folder(_fetch(spec), spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path, path.resolve().name)
    if not path.is_file():
        raise UsageError(f"{spec} is no file or folder; a model of the Hub is named {HUB_PREFIX}ORG/NAME")
    return _open_file(path)


def _fetch(spec: str) -> Path:
    """The folder of a repository, with safetensors alone where it has them."""
    folder = fetch_folder(spec, (*SMALL, "model*.safetensors"))
    return folder if list(folder.glob("model*.safetensors")) else fetch_folder(spec, (*SMALL, "pytorch_model*.bin"))


def _open_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        tensors, prefix = without_wrappers(read_safetensors(path))
        return Source(path.name, {path.name: sha256(path)}, tensors, prefix)
    if path.suffix not in PICKLES:
        raise UsageError(f"{path} has an unknown ending; weights are one of *{', *'.join((*PICKLES, '.safetensors'))}")
    found = read_pickle(path)
    wrapped, aside = unwrap(found, path)
    tensors, prefix = without_wrappers(wrapped)
    return Source(path.name, {path.name: sha256(path)}, tensors, prefix, aside, _hyperparameters(found))


def _open_folder(folder: Path, name: str) -> Source:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{folder} has no config.json, so it is no transformers folder; name the file") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} does not hold the settings of a model")
    files = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    aside: dict[str, str] = {}
    for file in files:
        more, other = (read_safetensors(file), {}) if file.suffix == ".safetensors" else unwrap(read_pickle(file), file)
        if twice := sorted(tensors.keys() & more.keys()):
            raise CheckpointError(
                f"'{twice[0]}' is in two shards of {folder}, the second is {file.name}; fetch it again"
            )
        tensors, aside = tensors | more, aside | other
    hashes = {file.name: sha256(file) for file in files}
    return Source(name, hashes, tensors, aside=aside, config=config, folder=folder)


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a transformers folder."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
    raise UsageError(f"{folder} holds no weights; looked for {' and '.join(WEIGHTS)}, whole or with an index of shards")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        paths = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error}") from error
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {index.name} points to it")
    return paths


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, at least one, whose header, sizes and offsets agree. Raises CheckpointError for others."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: its header does not fit its bytes ({error}); fetch it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; name the file that holds the weights")
    return tensors


def read_pickle(path: Path) -> Any:
    """What torch.save wrote: tensors, containers, plain values and argparse.Namespace.

    Raises CheckpointError if the file holds anything else, by the name of the class, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        foreign = FOREIGN.search(str(error))
        what = f"it holds {foreign[1]}" if foreign else "it holds more than tensors and plain values"
        raise CheckpointError(
            f"{path} is refused: {what}, and loading that could run code. Ask its author for a .safetensors file, or "
            "save the bare state dict where you trust the file"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError and others for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a whole file of torch.save ({reason}); fetch it again") from error


def unwrap(found: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in what a file holds, and its other entries with the reason why they are not used.

    Raises CheckpointError if there are none.
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not tensors by name")
    name = next((name for name in STATES if isinstance(found.get(name), Mapping)), None)
    state = found if name is None else found[name]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name; known places are {', '.join(STATES)}, or the top")
    plain = {str(key): type(value).__name__ for key, value in state.items() if str(key) not in tensors}
    aside = {key: f"no tensor but a value ({kind})" for key, kind in plain.items()}
    if name is not None:
        aside |= {f"({key})": "of the training, not of the model" for key in found if key != name}
    return tensors, aside


def without_wrappers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors without what a wrapper put before every key, and that."""
    found, prefix = dict(tensors), ""
    while (wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in found)), None)) is not None:
        found, prefix = {key.removeprefix(wrapper): tensor for key, tensor in found.items()}, prefix + wrapper
    return found, prefix


def _hyperparameters(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a Lightning checkpoint says of its model."""
    given = found.get("hyper_parameters")
    inner = given.get("config") if isinstance(given, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}
