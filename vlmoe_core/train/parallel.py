"""Processes, devices and precision: everything that Accelerate and torch.distributed do for a run."""

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from vlmoe_core.errors import DataError, RecipeError, TokenizerError, TrainError, VlmoeError
from vlmoe_core.moe.experts import Experts
from vlmoe_core.train.config import TrainConfig

T = TypeVar("T")
E = TypeVar("E", bound=VlmoeError)
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
LOW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_machine(config: TrainConfig) -> None:
    """Raises RecipeError where the machine, or what is installed on it, can't do what the recipe asks for."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError("train.precision is fp16, which needs a GPU; use bf16 or fp32 on this machine")
    absent = [name for name in config.trackers if find_spec(name) is None]
    if absent:
        raise RecipeError(
            f"train.trackers names {', '.join(absent)}, which is not installed; pip install {' '.join(absent)}, or "
            "take it out: metrics.jsonl is always written"
        )


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The process's place in the run, alone or as torchrun and Accelerate's launcher started it.

    Raises:
        RecipeError: see `check_machine`.
        TrainError: the processes that were started did not find each other.
    """
    check_machine(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=meets_on_cpu(),
        mixed_precision=PRECISIONS[config.precision],
        log_with=list(config.trackers) or None,
        project_dir=".",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    ranks = accelerator.num_processes
    if ranks != started_processes():
        raise TrainError(
            f"{started_processes()} processes were started (WORLD_SIZE), but each would train alone: Accelerate found "
            "no way for them to talk; start them with torchrun or accelerate launch"
        )
    return accelerator


def started_processes(variable: str = "WORLD_SIZE") -> int:
    """Processes that a launcher started: in all, or on this machine (LOCAL_WORLD_SIZE). 1 without a launcher."""
    return int(os.environ.get(variable, "1"))


def meets_on_cpu() -> bool:
    """Whether Accelerate must be told to use the CPU.

    Without that it finds no backend for several processes on a machine without a GPU, or on Apple's, and each of them
    would train alone (Accelerate 1.15).
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is None or (device.type == "mps" and started_processes() > 1)


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


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if several_ranks():
        dist.all_reduce(tensor)
    return tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums and counts: float64, save on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers that rank 0 has."""
    if several_ranks():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather_objects(value: T) -> list[T]:
    """What each rank has, on every rank."""
    if not several_ranks():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def gather_on_main(value: T) -> list[T]:
    """What each rank has, on rank 0; nothing on the other ranks."""
    if not several_ranks():
        return [value]
    values: list[T | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []  # type: ignore[return-value]


def gather_messages(message: str | None) -> Sequence[str]:
    """The messages of all ranks that have one."""
    return [m for m in gather_objects(message) if m]


def meet() -> None:
    """Wait for all ranks, which may leave after that: a rank that is slow to hear what the last ones said must not find
    them gone (torch 2.13, gloo: their connection is reset, and what was on its way is lost).

    A rank that does find another one gone has met it: that one left when all had come.
    """
    with suppress(RuntimeError):
        gather_objects(None)


def of_all(error: E) -> E:
    """An error that all ranks raise at this place, so that rank 0 can tell it for all."""
    meet()
    error.of_all = True
    return error


def refuse_broken(broken: Sequence[str]) -> None:
    """Raise DataError, the same on every rank, if any rank met a broken example; all ranks call it."""
    found = gather_messages(broken[0] if broken else None)
    if found:
        raise of_all(DataError(f"{found[0]}; mend it, or set data.on_error=skip to leave its place empty"))


def refuse_codes(refused: Sequence[str]) -> None:
    """Raise TokenizerError, the same on every rank, if any rank met stored codes of other pixels; all ranks call it."""
    found = gather_messages(refused[0] if refused else None)
    if found:
        raise of_all(TokenizerError(found[0]))


def on_main(work: Callable[[], T]) -> T | None:
    """Do something on rank 0 while the others wait. An error that a user can mend is raised on every rank.

    Returns what the work returns, on rank 0; null on the other ranks.
    """
    found, error = _attempt(work) if not several_ranks() or dist.get_rank() == 0 else (None, None)
    told = [error]
    if several_ranks():
        dist.broadcast_object_list(told)
    if told[0] is not None:
        raise of_all(told[0]) from error
    return found


def everywhere(work: Callable[[], T]) -> T:
    """Do something on every rank, without collectives. An error that a user can mend, of any of them, is raised on all.

    Returns what the work returns on this rank.
    """
    found, error = _attempt(work)
    errors = [one for one in gather_objects(error) if one is not None]
    if errors:
        raise of_all(errors[0]) from error
    return found  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, VlmoeError | None]:
    """What the work returns, or an error that a user can mend."""
    try:
        return work(), None
    except VlmoeError as caught:
        return None, caught
    except OSError as caught:
        place = caught.filename or "a file"
        return None, TrainError(f"{place} can't be read or written: {caught.strerror or caught}")


def from_main(value: T | None) -> T:
    """What rank 0 has, on every rank."""
    values = [value]
    if several_ranks():
        dist.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


def end_processes() -> None:
    """Leave the group of ranks, once nothing is left that trained in it.

    DistributedDataParallel must go before the group. As its last owner it would destroy the group while it holds
    Python's lock, for which a thread of the group may be waiting (torch 2.13, gloo: a hang, some times in a hundred).
    """
    if several_ranks():
        gc.collect()
        meet()
        dist.destroy_process_group()
