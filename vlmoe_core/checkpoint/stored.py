"""Tensors of a checkpoint, read only when asked for. E: experts."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmoe_core.checkpoint.held import Box
from vlmoe_core.checkpoint.names import fuse, fused_name, group_experts
from vlmoe_core.checkpoint.quantised import dequantise, scale_name
from vlmoe_core.checkpoint.shards import index_name
from vlmoe_core.checkpoint.spans import spans_in
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


@dataclass(frozen=True, eq=False)
class Piece:
    """What was read at once of the part of a tensor that was asked for."""

    name: str
    """Of the tensor in memory."""
    row: int | None
    """Which of the part's experts it is, from 0; null: it is the whole part."""
    tensor: Tensor
    """Values of the file, which stay there until they are looked at."""

    def place(self, part: Tensor) -> Tensor:
        """Where in the part it belongs."""
        return part if self.row is None else part[self.row]


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

    def pieces(self, boxes: Mapping[str, Box]) -> Iterator[Piece]:
        """The parts of tensors that the boxes tell, read piece by piece: expert by expert, or a tensor at once.

        Shard after shard, so that each is opened once. Nothing else is read: no other expert, no other row.
        """
        asked = chain.from_iterable(self._keys(name, box) for name, box in boxes.items())
        for key, name, row, box in sorted(asked, key=lambda found: self._shard_of[self._tied.get(found[0], found[0])]):
            piece = self._load(key, box)
            yield Piece(name, row, piece if row is not None else piece.reshape([len(side) for side in boxes[name]]))

    def _keys(self, name: str, box: Box) -> Iterator[tuple[str, str, int | None, Box]]:
        """The keys on disk of a part: key, name in memory, row among the experts of the part, box within the key.

        Of a part without experts it is no value of the first, for its type.
        """
        parts = self._parts[name]
        if parts == (name,):
            yield name, name, None, box
        elif box[0]:
            yield from ((parts[expert], name, row, box[1:]) for row, expert in enumerate(box[0]))
        else:
            yield parts[0], name, None, tuple(range(0) for _ in box[1:])

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def shards(self) -> frozenset[str]:
        """The names of its files of tensors."""
        return frozenset(self._shard_of.values())

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

    def _load(self, part: str, box: Box | None = None) -> Tensor:
        """A tensor on disk, or a part of it, as it is in memory."""
        if part in self._quantised:
            return dequantise(self._read(part, box), self._read(scale_name(part), box and box[:-1]))
        return self._read(part, box)

    def _read(self, part: str, box: Box | None) -> Tensor:
        """A tensor, or a part of it, as it stands on disk."""
        key = self._tied.get(part, part)
        shard = self._shard_of[key]
        try:
            file = self._shard(shard)
            tensor: Tensor = file.get_slice(key)[_slices(box)] if box else file.get_tensor(key)
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
            found = {key: TensorInfo(span.dtype, span.shape, span.nbytes) for key, span in spans_in(path).items()}
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


def pieces(tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> Iterator[Piece]:
    """As `StoredTensors.pieces`, of any mapping: a part of what is in memory already is one piece."""
    if isinstance(tensors, StoredTensors):
        return tensors.pieces(boxes)
    return (Piece(name, None, tensors[name][_slices(box)]) for name, box in boxes.items())


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """As `StoredTensors.shape`, of any mapping."""
    return tensors.shape(name) if isinstance(tensors, StoredTensors) else tuple(tensors[name].shape)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(numbers.start, numbers.stop) for numbers in box)


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
