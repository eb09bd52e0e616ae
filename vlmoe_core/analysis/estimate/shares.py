"""What each process holds, built on the meta device as it would build it."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from vlmoe_core.analysis.estimate.fake import build_on_meta
from vlmoe_core.analysis.estimate.live import held
from vlmoe_core.analysis.estimate.world import imitated
from vlmoe_core.moe.experts import Experts
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train.mesh import Mesh
from vlmoe_core.train.parallel import LOW_DTYPES, hold_expert_copies
from vlmoe_core.train.wrapping import cut_weights, is_cut, shared_parameters

MOMENTS = 2
"""Of AdamW, for each trained parameter."""


@dataclass(frozen=True)
class Holding:
    """What one process holds before a step."""

    rank: int
    """Its number."""
    experts: int
    """Parameters of experts."""
    dense: int
    """All other parameters."""
    weights: int
    """Bytes of parameters and buffers."""
    copies: int
    """Bytes of low-precision copies of expert weights."""
    moments: int
    """Bytes of AdamW's moments."""
    buckets: int
    """Bytes of DistributedDataParallel's buckets."""

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.experts + self.dense

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weights + self.copies + self.moments + self.buckets


def holdings(
    recipe: Recipe, labels: Labels, world: int, trained: Collection[str], ranks: Iterable[int]
) -> Iterator[Holding]:
    """Build the share of each of these ranks, out of `world` processes.

    Args:
        recipe: the run.
        labels: what the head of a task chooses from.
        world: number of processes.
        trained: names of the parameters that get a gradient.
        ranks: the processes that are built. The first holds the most, the last the least.
    """
    for rank in ranks:
        with imitated(recipe, world, rank) as mesh:
            objective = build_on_meta(recipe, labels, mesh=mesh)
            low = LOW_DTYPES.get(recipe.train.precision)
            if mesh.world is not None and mesh.shard == "full":
                cut_weights(objective, mesh, low)
            else:
                hold_expert_copies(objective, recipe.train)
            yield _holding(rank, objective, mesh, trained)


def _holding(rank: int, objective: nn.Module, mesh: Mesh, trained: Collection[str]) -> Holding:
    sizes = {name: held(parameter).numel() for name, parameter in objective.named_parameters()}
    in_experts = {
        f"{prefix}.{name}"
        for prefix, module in objective.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }
    experts = sum(sizes[name] for name in in_experts)
    learnt = {name: held(p).nbytes for name, p in objective.named_parameters() if name in trained}
    shares = {name for name, _ in shared_parameters(objective)}
    buffers = dict(objective.named_buffers())
    copies = sum(buffer.nbytes for name, buffer in buffers.items() if name.endswith(".copy"))
    averaged = mesh.size > 1 and not is_cut(objective)
    return Holding(
        rank=rank,
        experts=experts,
        dense=sum(sizes.values()) - experts,
        weights=sum(held(t).nbytes for t in (*objective.parameters(), *buffers.values())) - copies,
        copies=copies,
        moments=MOMENTS * sum(learnt.values()),
        buckets=sum(size for name, size in learnt.items() if name not in shares) if averaged else 0,
    )
