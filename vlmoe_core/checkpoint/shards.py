"""Writes named tensors as safetensors shards and an index that any safetensors reader understands."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlmoe_core.checkpoint.files import sync
from vlmoe_core.checkpoint.manifest import FileRecord, record_file
from vlmoe_core.checkpoint.offers import check_plain, offer, place_of, split
from vlmoe_core.checkpoint.owners import Plan, make_plan, plan_shards, shard_name
from vlmoe_core.errors import CheckpointError
from vlmoe_core.tensor_file import write_tensor_file

MAX_SHARD_BYTES = 2**30


def index_name(stem: str) -> str:
    """File name of the index: which shard holds which key."""
    return f"{stem}.safetensors.index.json"


def write_tensors(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> dict[str, FileRecord]:
    """Write tensors that are all in this process under their names on disk, and their index.

    A tensor that shares its storage with an earlier one is written once; the index records the tie. It also
    lists what is quantised, of `QuantisedTensors`.

    Returns:
        What the shards are.

    Raises:
        CheckpointError: a tensor has no values, or a type that safetensors can't hold.
    """
    offers = offer(tensors)
    plan = make_plan(stem, [offers], max_shard_bytes)
    write_index(folder, plan)
    return write_files(folder, plan.files[0], split(tensors, offers))


def write_index(folder: Path, plan: Plan) -> None:
    """Write the index of a part."""
    (folder / index_name(plan.stem)).write_text(plan.index, encoding="utf-8")


def write_files(
    folder: Path, files: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor]
) -> dict[str, FileRecord]:
    """Write and sync the shards of one process, by name the keys that each holds; errors as `write_shard`.

    Returns:
        What each file is, taken while its bytes are still in the cache of the system.
    """
    records: dict[str, FileRecord] = {}
    for name, keys in files.items():
        write_shard(folder / name, {key: tensors[key] for key in keys})
        sync(folder / name)
        records[name] = record_file(folder / name)
    return records


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
        check_plain(name, tensor)
        place = place_of(tensor)
        owner = first.setdefault(place, name) if place is not None else name
        if owner == name:
            stored[name] = tensor
        else:
            tied[name] = owner
    return stored, tied


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of tensors. What the library can't write as it lies in memory is copied.

    Raises CheckpointError for a type that safetensors can't hold.
    """
    written: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        fits = _is_alone(tensor) and tensor.untyped_storage().data_ptr() not in storages
        written[name] = tensor.detach() if fits else _copy(tensor)
        storages.add(written[name].untyped_storage().data_ptr())
    try:
        write_tensor_file(path, written, {"format": "pt"})
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path.name} can't be written: {error} (it holds {_dtypes(written)})") from error


def _is_alone(tensor: Tensor) -> bool:
    """Whether a tensor lies in host memory, in order, and nothing else beside it."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return whole and tensor.device.type == "cpu"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).cpu()


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
