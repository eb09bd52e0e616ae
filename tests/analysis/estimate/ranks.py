"""A real step of one of several processes, that meet through gloo: what it sends, and what lies in its memory."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tests.analysis.estimate.support import Storages, real_batches, tensors_of
from vlmoe_core.analysis.estimate.collectives import Collective, Collectives
from vlmoe_core.analysis.estimate.live import held
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.interrupt import Interrupt
from vlmoe_core.train.mesh import open_mesh
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.parallel import build_accelerator, hold_expert_copies
from vlmoe_core.train.run import Trainer
from vlmoe_core.train.saving import Keeping, Saving
from vlmoe_core.train.step import Stepper
from vlmoe_core.train.wrapping import is_cut, shared_out, wrap


@dataclass(frozen=True)
class Seen:
    """Of one process."""

    collectives: tuple[Collective, ...]
    """What it sent in a step, DistributedDataParallel's sums included."""
    peak: int
    """The most bytes of tensors in a step."""
    parameters: int
    """Numbers that it holds."""
    weights: int
    """Bytes of parameters and buffers, low-precision copies left out."""
    moments: int
    """Bytes of AdamW's moments."""


def third_step(recipe: Recipe) -> Seen:
    """For a child: the third step of a run. The moments are there from the first one on, the last buckets from the
    second one on."""
    accelerator = build_accelerator(recipe.train)
    mesh = open_mesh(recipe.parallel, "cpu")
    with shared_out(mesh):
        objective = build_objective(recipe, None)
    model = wrap(accelerator, objective, mesh, recipe.train.precision)
    optimizer = accelerator.prepare(build_optimizer(objective, recipe.optim, recipe.model.layers))
    if not is_cut(objective):
        hold_expert_copies(objective, recipe.train)
    stepper = Stepper(accelerator, model, mesh, optimizer, recipe.optim, recipe.train.steps, recipe.seed)
    micros = [MicroBatch(n, real_batches(recipe), ()) for n in range(recipe.batch.num_micro // mesh.size)]
    sends, seen = Collectives(), Storages()
    with _Summed(seen):
        for step in (0, 1):
            stepper(step, micros)
    optimizer.zero_grad(set_to_none=True)
    with seen, sends:
        inputs = [tensor for micro in micros for batch in micro.batches.values() for tensor in tensors_of(batch)]
        for tensor in (*objective.parameters(), *objective.buffers(), *_moments(optimizer), *inputs):
            seen.see(tensor)
        stepper(2, micros, tell=told_by_a_run)
    buffers = [buffer for name, buffer in objective.named_buffers() if not name.endswith(".copy")]
    return Seen(
        tuple(sends.seen),
        seen.peak,
        sum(held(p).numel() for p in objective.parameters()),
        sum(held(t).nbytes for t in (*objective.parameters(), *buffers)),
        sum(held(t).nbytes for t in _moments(optimizer)),
    )


def told_by_a_run() -> dict[str, float]:
    """What processes tell each other at each step of a run."""
    trainer: Any = SimpleNamespace(saving=Saving(Keeping(Path("run"), keep_last=1), 0, 1))
    return Trainer._tell(trainer, Interrupt())


class _Summed(TorchDispatchMode):
    """Lets another mode see all that is summed over processes. Of that DistributedDataParallel's buckets stay."""

    def __init__(self, seen: Storages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and look at what was summed."""
        found = func(*args, **(kwargs or {}))
        if func.name() == "c10d::allreduce_":
            self.seen.see(args[0][0])
        return found


def _moments(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value.dim()]
