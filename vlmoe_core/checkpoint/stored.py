"""Tensors of a checkpoint, read only when asked for. E: experts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmoe_core.checkpoint.manifest import HEADER_LENGTH
from vlmoe_core.checkpoint.names import fuse, group_experts
from vlmoe_core.checkpoint.shards import index_name
from vlmoe_core.errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one key."""

    dtype: str
    """As safetensors writes it: F32, BF16, I64, BOOL."""
    shape: tuple[int, ...]
    """Sizes of the dimensions."""
    nbytes: int
    """Bytes on disk."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)


class StoredTensors(Mapping[str, Tensor]):
    """Tensors under their names in memory, experts fused to (E, ...). Each look-up reads that tensor alone.

    Opening reads the index and all headers. `infos` describes the keys on disk: experts split, ties left out.
    """

    def __init__(self, folder: Path, stem: str):
        """Open the index and the shards of one part of a checkpoint.

        Raises:
            CheckpointError: index and shards contradict each other, a header lies, or an expert is missing.
        """
        self._folder = folder
        self._shard_of, self._tied = _read_index(folder / index_name(stem))
        _check_shards(folder, stem, set(self._shard_of.values()))
        self._shards = {name: _open_shard(folder / name) for name in sorted(set(self._shard_of.values()))}
        self.infos = self._read_infos()
        self._parts = group_experts([*self._shard_of, *self._tied])
        self._check_experts_alike()

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        return fuse([self._load(part) for part in parts], name, parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def tied(self) -> Mapping[str, str]:
        """Names on disk that show the very tensor of another name."""
        return self._tied

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name` in memory, without reading it."""
        parts = self._parts[name]
        shape = self._info(parts[0]).shape
        return shape if parts == (name,) else (len(parts), *shape)

    def experts(self) -> dict[str, int]:
        """E of each tensor that is split over experts."""
        return {name: len(parts) for name, parts in self._parts.items() if parts != (name,)}

    def _load(self, part: str) -> Tensor:
        key = self._tied.get(part, part)
        shard = self._shard_of[key]
        try:
            tensor: Tensor = self._shards[shard].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{key}' can't be read from {self._folder / shard}: {error}") from error
        return tensor

    def _info(self, part: str) -> TensorInfo:
        return self.infos[self._tied.get(part, part)]

    def _read_infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for shard in self._shards:
            path = self._folder / shard
            found = _read_header(path)
            expected = {key for key, place in self._shard_of.items() if place == shard}
            for key in sorted(expected - set(found)):
                raise CheckpointError(f"'{key}' is missing in {path}, where the index says it is")
            for key in sorted(set(found) - expected):
                raise CheckpointError(f"{path} holds '{key}', which the index does not list there")
            infos |= found
        for name, owner in self._tied.items():
            if owner not in infos or name in infos:
                raise CheckpointError(f"'{name}' is recorded in {self._folder} as tied to '{owner}', which can't be")
        return infos

    def _check_experts_alike(self) -> None:
        for parts in self._parts.values():
            first = self._info(parts[0])
            for part in parts:
                info = self._info(part)
                if info != first:
                    raise CheckpointError(
                        f"experts differ in {self._folder}: '{part}' is {info}, '{parts[0]}' is {first}"
                    )


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    try:
        index = json.loads(path.read_bytes())
        weight_map, tied = index["weight_map"], index["metadata"]["tied"]
        pairs = [*weight_map.items(), *tied.items()]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of shards (weight_map, metadata.tied): {error}") from error
    if not all(isinstance(value, str) for _, value in pairs):
        raise CheckpointError(f"{path} is not an index of shards: weight_map and metadata.tied must hold names")
    return weight_map, tied


def _check_shards(folder: Path, stem: str, indexed: set[str]) -> None:
    on_disk = {path.name for path in folder.glob(f"{stem}-*.safetensors")}
    for name in sorted(indexed - on_disk):
        raise CheckpointError(f"{folder / name} is missing: {index_name(stem)} points to it")
    for name in sorted(on_disk - indexed):
        raise CheckpointError(f"{folder / name} does not belong here: {index_name(stem)} does not list it")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with path.open("rb") as file:
        (length,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
        header = json.loads(file.read(length))
    return {
        key: TensorInfo(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }
