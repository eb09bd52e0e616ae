"""Ways in which two processes share a model, for the benchmarks that compare them.

Shapes: T tokens, K choices of a token, P processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from tests.benchmarks.workload import make_objective
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.plan import RoutingPlan
from vlmoe_core.objectives.kinds.masked import MaskedModelling
from vlmoe_core.train.config import OptimConfig, ParallelConfig
from vlmoe_core.train.mesh import ALONE, open_mesh
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.step import Stepper
from vlmoe_core.train.wrapping import shared_out, wrap

PROCESSES = 2
STEPS = 10_000
OPTIM = OptimConfig(lr=1e-4, clip_norm=1.0)


@dataclass(frozen=True)
class Side:
    """A way to share the work."""

    objective: MaskedModelling
    stepper: Stepper


def build_side(accelerator: Accelerator, config: ModelConfig, expert: int) -> Side:
    """The objective and its steps with `parallel.expert`; of one process without a mesh."""
    several = accelerator.num_processes > 1
    mesh = open_mesh(ParallelConfig(expert=expert), accelerator.device.type) if several else ALONE
    with shared_out(mesh):
        objective = make_objective(config)
    model = wrap(accelerator, objective, mesh, "fp32")
    optimizer = accelerator.prepare(build_optimizer(objective, OPTIM, objective.encoder.config.layers))
    return Side(objective, Stepper(accelerator, model, mesh, optimizer, OPTIM, STEPS, seed=0))


def cpu_accelerator() -> Accelerator:
    """The place of this process among those on the CPU."""
    return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])


def together(case: Callable[[], object]) -> Callable[[], None]:
    """A case that ends when all processes have ended it."""

    def wait() -> None:
        case()
        dist.barrier()

    return wait


def busier(objective: MaskedModelling, batches: Mapping[StreamName, Batch]) -> float:
    """Mean over layers and streams of the share of the choices that the busier of all processes computes."""
    with torch.no_grad():
        plans = [one.plan for _, one in objective(batches).routed]
    there_LP = torch.stack([_by_process(plan) for plan in plans]).float()
    dist.all_reduce(there_LP)
    return float((there_LP.amax(1) / there_LP.sum(1)).mean())


def process_TK(plan: RoutingPlan) -> Tensor:
    """(T, K) the process that holds the chosen expert."""
    return plan.expert_TK // (plan.num_experts // PROCESSES)


def _by_process(plan: RoutingPlan) -> Tensor:
    """(P,) kept choices that each process computes."""
    return torch.bincount(process_TK(plan)[plan.kept_TK], minlength=PROCESSES)
