"""Gradients that DistributedDataParallel leaves alone, and the norm of all of them over all processes."""

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from vlmoe_core.train.mesh import Mesh
from vlmoe_core.train.wrapping import is_cut, shared_parameters


class Gradients:
    """The gradients of a wrapped objective after the backward passes of a step.

    Args:
        objective: the objective, not the wrapper around it.
        mesh: how the processes share it.
    """

    def __init__(self, objective: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.cut = is_cut(objective)
        shares = [p for _, p in shared_parameters(objective) if p.requires_grad]
        self.shares = [] if self.cut and mesh.data > 1 else shares
        """Those of experts that are not averaged yet."""
        self.scalars = [p for p in self.parameters if self.cut and not isinstance(p, DTensor)]
        """Those that fully_shard can't cut, and leaves alone."""

    @property
    def spread(self) -> bool:
        """Whether a process holds gradients that others don't have."""
        return self.cut or bool(self.shares)

    @torch.no_grad()
    def sum_shares(self) -> None:
        """Sum what is not averaged yet over the processes that hold it, and divide as all else: by all processes."""
        if not (self.shares or self.scalars):
            return
        assert self.mesh.grid is not None and self.mesh.world is not None, "several processes"
        held = [(self.shares, self.mesh.grid.get_group("data")), (self.scalars, self.mesh.world.get_group())]
        sums = [
            dist.all_reduce(gradient, group=group, async_op=True)
            for parameters, group in held
            for gradient in _gradients(parameters)
            if group.size() > 1
        ]
        for work in sums:
            work.wait()
        if summed := _gradients([*self.shares, *self.scalars]):
            torch._foreach_div_(summed, float(self.mesh.size))

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of at most `max_norm`; returns the norm before. All ranks call it."""
        norm = self._norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(_gradients(self.parameters), scale)
        return norm

    def _norm(self) -> Tensor:
        if not self.spread:
            return get_total_norm(_gradients(self.parameters))
        assert self.mesh.grid is not None and self.mesh.world is not None, "several processes"
        same = {id(p) for p in (self.scalars if self.cut else self.parameters)} - {id(p) for p in self.shares}
        everywhere = [p for p in self.parameters if id(p) in same]
        apart = [p for p in self.parameters if id(p) not in same]
        squares = get_total_norm(_gradients(apart)) ** 2
        dist.all_reduce(squares, group=self.mesh.world.get_group() if self.cut else self.mesh.grid.get_group("expert"))
        return (squares + get_total_norm(_gradients(everywhere)) ** 2).sqrt()


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """What this process holds of the gradients that there are."""
    found = [p.grad for p in parameters if p.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found]


def agree_on_overflow(scaler: torch.amp.GradScaler, optimizer: AcceleratedOptimizer) -> None:
    """Let all ranks skip an update where the gradients of one of them overflowed in fp16; after unscaling."""
    for found in scaler._found_inf_per_device(optimizer.optimizer).values():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
