"""Writes named tensors as safetensors shards and an index that any safetensors reader understands."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlmoe_core.checkpoint.manifest import dump_json
from vlmoe_core.checkpoint.names import fused_name, split_experts
from vlmoe_core.checkpoint.quantised import QuantisedTensors
from vlmoe_core.errors import CheckpointError

MAX_SHARD_BYTES = 2**30


def index_name(stem: str) -> str:
    """File name of the index: which shard holds which key."""
    return f"{stem}.safetensors.index.json"


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of one shard, numbered from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors under their names on disk, shard after shard: one shard more than `tensors` in memory.

    A tensor that shares its storage with an earlier one is written once; the index records the tie. It also
    lists what is quantised, of `QuantisedTensors`.

    Raises:
        CheckpointError: a tensor has no values, or a type that safetensors can't hold.
    """
    split = split_experts(tensors)
    stored, tied = separate_tied(split)
    weight_map = write_shards(folder, stem, stored, max_shard_bytes)
    metadata: dict[str, object] = {"total_size": sum(tensor.nbytes for tensor in stored.values()), "tied": tied}
    if isinstance(tensors, QuantisedTensors):
        metadata["quantised"] = [name for name in split if fused_name(name) in tensors.quantised]
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / index_name(stem)).write_text(dump_json(index), encoding="utf-8")


def write_shards(folder: Path, stem: str, stored: Mapping[str, Tensor], max_shard_bytes: int) -> dict[str, str]:
    """Write tensors, none of them tied, under their names. Returns which shard holds which; errors likewise."""
    plan = plan_shards({name: tensor.nbytes for name, tensor in stored.items()}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        shard = shard_name(stem, number, len(plan))
        write_shard(folder / shard, {name: stored[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    return weight_map


def separate_tied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that must be written, and for every other name the one whose very same memory it shows."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(f"'{name}' can't be saved: it is on {tensor.device} with layout {tensor.layout}")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            stored[name] = tensor
        else:
            tied[name] = owner
    return stored, tied


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Cut names, in order, into shards of at most `max_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of tensors. Raises CheckpointError for a type that safetensors can't hold."""
    whole = torch.contiguous_format
    copies = {name: tensor.detach().clone(memory_format=whole).cpu() for name, tensor in tensors.items()}
    try:
        save_file(copies, path, metadata={"format": "pt"})
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path.name} can't be written with {_dtypes(copies)}: {error}") from error


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
