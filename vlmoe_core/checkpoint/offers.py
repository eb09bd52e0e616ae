"""What a process can give to a checkpoint: it tells the others, so that every tensor is written by one of them.

A sharded tensor (DTensor) is offered whole by every process that has a part of it: they gather it. E: experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlmoe_core.checkpoint.names import EXPERTS, disk_names, expert_of, layer_of
from vlmoe_core.checkpoint.quantised import QuantisedTensors
from vlmoe_core.errors import CheckpointError
from vlmoe_core.moe.share import Share, whole

Shares = Callable[[str], Share | None]
"""The share of a layer's experts that the tensor of a name in memory is; None: all of them, or it has none."""


@dataclass(frozen=True)
class Offer:
    """One tensor in memory."""

    share: Share | None
    """Which experts its rows are; None: it is one tensor on disk."""
    nbytes: int
    """Bytes of the tensor on disk, or of one expert's."""


@dataclass(frozen=True)
class Offers:
    """The tensors of one part of a checkpoint, model or optimiser, that a process can give."""

    tensors: Mapping[str, Offer]
    """By their names in memory."""
    tied: Mapping[str, str]
    """Names on disk of what lies in the memory of another name, with that name."""
    quantised: frozenset[str] | None
    """Names in memory of what is int8, of `QuantisedTensors`; None for any other tensors."""


def offer(tensors: Mapping[str, Tensor], shares: Shares = lambda name: None) -> Offers:
    """What this process can give of these tensors. Nothing is copied, nothing gathered.

    Raises:
        CheckpointError: a tensor has no values, no expert or already an expert's number.
    """
    offered: dict[str, Offer] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        offered[name] = _offer(name, tensor, shares(name))
        for key, row in disk_names(name, offered[name].share).items():
            place = place_of(tensor, row)
            owner = first.setdefault(place, key) if place is not None else key
            tied |= {} if owner == key else {key: owner}
    return Offers(offered, tied, tensors.quantised if isinstance(tensors, QuantisedTensors) else None)


def split(tensors: Mapping[str, Tensor], offers: Offers) -> dict[str, Tensor]:
    """The tensors that were offered, none of them sharded, by their names on disk. Experts are views of their layer."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rows = disk_names(name, offers.tensors[name].share)
        found |= {key: tensor if row is None else tensor[row] for key, row in rows.items()}
    return found


def check_plain(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for a tensor without values of its own."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(f"'{name}' can't be saved: it is on {tensor.device} with layout {tensor.layout}")


def place_of(tensor: Tensor, row: int | None = None) -> tuple[object, ...] | None:
    """Where the values of a tensor, or of its row, lie: the same for two names of one memory.

    None where there are no values. The part of a sharded tensor may be empty on some processes: those that have values
    know the tie.
    """
    sharded = isinstance(tensor, DTensor)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor if row is None else tensor[row]
    if not local.numel():
        return None
    return local.device, local.data_ptr(), local.dtype, local.shape, local.stride(), row if sharded else None


def _offer(name: str, tensor: Tensor, share: Share | None) -> Offer:
    check_plain(name, tensor)
    if expert_of(name) is not None:
        raise CheckpointError(f"'{name}' has an expert's number; in memory the experts are one tensor (E, ...)")
    if layer_of(name) is None or tensor.ndim == 0:
        return Offer(None, tensor.nbytes)
    if tensor.shape[0] == 0:
        raise CheckpointError(f"'{name}' has shape {tuple(tensor.shape)}: no expert to write")
    share = share or whole(tensor.shape[0])
    if share.count != tensor.shape[0]:
        raise CheckpointError(f"'{name}' has {tensor.shape[0]} {EXPERTS}, but this process holds {share.count}")
    return Offer(share, tensor.nbytes // share.count)
