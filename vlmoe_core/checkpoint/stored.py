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
from vlmoe_core.checkpoint.names import fuse, fused_name, group_experts
from vlmoe_core.checkpoint.quantised import dequantise, scale_name
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

    A quantised tensor is given as float32, its scales are not among the names. Opening reads the index and all headers.
    `infos` describes the keys on disk: experts split, ties left out, int8 and scales as they are.

    One shard is open at a time. A file that is read is mapped, and counts as memory until it is closed: with all of
    them open, reading a model takes its size a second time.
    """

    def __init__(self, folder: Path, stem: str):
        """Open the index and the shards of one part of a checkpoint.

        Raises:
            CheckpointError: index and shards contradict each other, a header lies, or an expert is missing.
        """
        self._folder = folder
        self._shard_of, self._tied, self._quantised = _read_index(folder / index_name(stem))
        _check_shards(folder, stem, set(self._shard_of.values()))
        self._open: tuple[str, Any] | None = None
        self.infos = self._read_infos()
        scales = {scale_name(name) for name in self._quantised}
        self._parts = group_experts(name for name in (*self._shard_of, *self._tied) if name not in scales)
        self._check_experts_alike()
        self._check_quantised()

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        return fuse([self._load(part) for part in parts], name, parts)

    def pieces(self, name: str) -> Iterator[tuple[int | None, Tensor]]:
        """The tensor `name` read piece by piece: each expert with its number, or the whole with none."""
        parts = self._parts[name]
        for number, part in enumerate(parts):
            yield (None if parts == (name,) else number), self._load(part)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

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

    @property
    def quantised(self) -> frozenset[str]:
        """The names of the tensors that are int8 on disk."""
        return frozenset(fused_name(part) for part in self._quantised)

    @property
    def num_values(self) -> int:
        """Values of all tensors: tied ones once, no scales."""
        scales = {scale_name(part) for part in self._quantised}
        return sum(info.numel for name, info in self.infos.items() if name not in scales)

    def _load(self, part: str) -> Tensor:
        if part in self._quantised:
            return dequantise(self._read(part), self._read(scale_name(part)))
        return self._read(part)

    def _read(self, part: str) -> Tensor:
        """A tensor as it stands on disk."""
        key = self._tied.get(part, part)
        shard = self._shard_of[key]
        try:
            tensor: Tensor = self._shard(shard).get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{key}' can't be read from {self._folder / shard}: {error}") from error
        return tensor

    def _shard(self, name: str) -> Any:
        """The open file of a shard; the one before is closed."""
        if self._open is None or self._open[0] != name:
            self._open = None
            self._open = name, _open_shard(self._folder / name)
        return self._open[1]

    def _info(self, part: str) -> TensorInfo:
        return self.infos[self._tied.get(part, part)]

    def _read_infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for shard in sorted(set(self._shard_of.values())):
            path = self._folder / shard
            self._shard(shard)  # the library checks the whole header
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

    def _check_quantised(self) -> None:
        known = {*self._shard_of, *self._tied}
        for part in sorted(self._quantised):
            if lost := {part, scale_name(part)} - known:
                raise CheckpointError(f"'{min(lost)}' is missing in {self._folder}, where '{part}' is quantised")
            numbers, scale = self._info(part), self._info(scale_name(part))
            if (numbers.dtype, scale.dtype, scale.shape) != ("I8", "F32", numbers.shape[:-1]) or not numbers.shape:
                raise CheckpointError(
                    f"'{part}' in {self._folder} is not quantised as the index says: it is {numbers}, its scale {scale}"
                )
        for name in self.quantised:
            if whole := [part for part in self._parts[name] if part not in self._quantised]:
                raise CheckpointError(f"'{whole[0]}' in {self._folder} is not quantised, but other experts are")


def pieces(tensors: Mapping[str, Tensor], name: str) -> Iterator[tuple[int | None, Tensor]]:
    """As `StoredTensors.pieces`, of any mapping: what is in memory already is one piece."""
    return tensors.pieces(name) if isinstance(tensors, StoredTensors) else iter([(None, tensors[name])])


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """As `StoredTensors.shape`, of any mapping."""
    return tensors.shape(name) if isinstance(tensors, StoredTensors) else tuple(tensors[name].shape)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str], frozenset[str]]:
    """Which shard holds which key, which name shows which key, and what is quantised."""
    try:
        index = json.loads(path.read_bytes())
        weight_map, tied = index["weight_map"], index["metadata"]["tied"]
        quantised = index["metadata"].get("quantised", [])
        pairs = [*weight_map.items(), *tied.items()]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of shards (weight_map, metadata.tied): {error}") from error
    if not all(isinstance(value, str) for _, value in pairs):
        raise CheckpointError(f"{path} is not an index of shards: weight_map and metadata.tied must hold names")
    if not isinstance(quantised, list) or not all(isinstance(name, str) for name in quantised):
        raise CheckpointError(f"{path} is not an index of shards: metadata.quantised must be a list of names")
    return weight_map, tied, frozenset(quantised)


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
