"""Processes, devices and precision: everything that Accelerate and torch.distributed do for a run."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from vlmoe_core.errors import RecipeError
from vlmoe_core.moe.experts import Experts
from vlmoe_core.train.config import TrainConfig

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
LOW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_accelerator(config: TrainConfig, num_micro: int, project_dir: str) -> Accelerator:
    """The process's place in the run. Raises RecipeError where the recipe does not fit the machine."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError("train.precision is fp16, which needs a GPU; use bf16 or fp32 on this machine")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[config.precision],
        log_with=list(config.trackers) or None,
        project_dir=project_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    ranks = accelerator.num_processes
    if num_micro % ranks:
        fits = [n for n in range(1, num_micro + 1) if num_micro % n == 0]
        raise RecipeError(
            f"{num_micro} micro-batches a step (batch.size / batch.micro) can't be dealt to {ranks} processes; "
            f"these numbers of processes fit: {', '.join(map(str, fits))}; or change batch.micro"
        )
    return accelerator


def wrap(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as every rank trains it (DistributedDataParallel where there are several), and its optimiser."""
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def hold_expert_copies(model: nn.Module, config: TrainConfig) -> None:
    """Keep copies of the expert weights in the precision of the run, so that no step casts them."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.hold_copies(LOW_DTYPES.get(config.precision))


def refresh_expert_copies(model: nn.Module) -> None:
    """Bring the copies up to date: after each optimiser step and after loading."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.refresh_copies()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_messages(message: str | None) -> Sequence[str]:
    """The messages of all ranks that have one."""
    if not (dist.is_available() and dist.is_initialized()):
        return [message] if message else []
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return [m for m in messages if m]
