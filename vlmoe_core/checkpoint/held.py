"""What a process holds of the tensors of a module: whole ones, a share of the experts, rows of a sharded tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from vlmoe_core.checkpoint.names import EXPERTS
from vlmoe_core.moe.experts import expert_shares
from vlmoe_core.moe.share import Share

Box = tuple[range, ...]
"""Consecutive numbers along each dimension of a whole tensor; none for a tensor without dimensions."""


@dataclass(frozen=True, eq=False)
class Held:
    """The part of a tensor that is in the memory of this process."""

    local: Tensor
    """The part itself: what is copied into it is in the module."""
    shape: tuple[int, ...]
    """Of the whole tensor, over all processes."""
    box: Box
    """Where in the whole the part lies."""

    def take(self, whole: Tensor) -> None:
        """Copy this process's part of a tensor that is known as a whole, or of its first rows."""
        found = whole[tuple(slice(side.start, side.stop) for side in self.box)]
        self.local[: len(found)].copy_(found)


def held_tensors(module: nn.Module) -> dict[str, Held]:
    """What this process holds of each parameter and persistent buffer, by name."""
    shares = expert_shares(module)
    return {name: hold(tensor, share_of(name, shares)) for name, tensor in module.state_dict().items()}


def share_of(name: str, shares: Mapping[str, Share]) -> Share | None:
    """The share that the tensor P.experts.NAME belongs to, of those that `expert_shares` gave; null for any other."""
    parts = name.split(".")
    return shares.get(".".join(parts[: parts.index(EXPERTS) + 1])) if EXPERTS in parts else None


def hold(tensor: Tensor, share: Share | None) -> Held:
    """What this process holds of a tensor, which may be sharded, and the first dimension of which may be a share."""
    box = tuple(range(size) for size in tensor.shape)
    if isinstance(tensor, DTensor):
        box = _rows(tensor, box)
    if share is None or not box:
        return Held(_local(tensor), tuple(tensor.shape), box)
    experts = range(share.first + box[0].start, share.first + box[0].stop)
    return Held(_local(tensor), (share.total, *tensor.shape[1:]), (experts, *box[1:]))


def sharded_like(local: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that is sharded as another one is, of this process's part of it."""
    if not isinstance(tensor, DTensor):
        return local
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(tensor: DTensor, box: Box) -> Box:
    """The part of a sharded tensor: along each sharded dimension as `torch.chunk` cuts."""
    cut = list(box)
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            whole, ranks = cut[placement.dim], tensor.device_mesh.size(axis)
            length = -(-len(whole) // ranks)
            first = length * tensor.device_mesh.get_local_rank(axis)
            cut[placement.dim] = whole[first : first + length]
    return tuple(cut)
