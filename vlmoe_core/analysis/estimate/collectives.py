"""Follows what processes send each other in a step, real or imitated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmoe_core.analysis.estimate import wire

Operation = Literal["all-reduce", "all-gather", "list-gather", "reduce-scatter", "all-to-all", "broadcast"]
"""list-gather: an all-gather into tensors of their own."""


@dataclass(frozen=True)
class Collective:
    """One call."""

    operation: Operation
    """What was asked for."""
    ranks: int
    """Processes of the group."""
    dtype: torch.dtype
    """Of the numbers."""
    wire: int
    """Bytes that this process sends, or receives if that is more; see wire.py."""
    part: str
    """The part of the program that called it."""


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every collective inside.

    Whoever asks fake tensors for numbers that the processes of an imitated group told each other, gets that of this
    process: of its last list-gather.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = ""
        """Who calls now."""
        self.seen: list[Collective] = []
        """The calls, in their order."""
        self._told: float | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, and note it if it sends something."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor) and self._told:
            return self._told
        results = func(*args, **(kwargs or {}))
        known = _OPERATORS.get(func.name())
        if known is not None:
            self.seen.append(known.note(args, self.part))
            if known.operation == "list-gather":
                self._told = _number(args[1][0]) or self._told
        elif func.namespace in _SPACES and func.name() not in _SILENT:
            raise NotImplementedError(f"{func.name()}: how much it sends is not known here")
        return results


@dataclass(frozen=True)
class _Operator:
    """How torch calls a collective."""

    operation: Operation
    group: int
    """Place of the group among the arguments."""
    tensor: Callable[[tuple[Any, ...]], Tensor]
    """Arguments -> the tensor whose size counts."""

    def note(self, args: tuple[Any, ...], part: str) -> Collective:
        group = _group(args[self.group])
        tensor = self.tensor(args)
        size = _wire(self.operation, tensor, args, group)
        return Collective(self.operation, group.size(), tensor.dtype, size, part)


_OPERATORS = {
    "c10d::allreduce_": _Operator("all-reduce", 1, lambda args: args[0][0]),
    "c10d::broadcast_": _Operator("broadcast", 1, lambda args: args[0][0]),
    "c10d::allgather_": _Operator("list-gather", 2, lambda args: args[1][0]),
    "c10d::_allgather_base_": _Operator("all-gather", 2, lambda args: args[0]),
    "c10d::_reduce_scatter_base_": _Operator("reduce-scatter", 2, lambda args: args[1]),
    "_c10d_functional::all_to_all_single": _Operator("all-to-all", 3, lambda args: args[0]),
}
"""Those that a step uses. The tensor of a gather or scatter is the whole one, save that of a list, which is a part."""
_SPACES = ("c10d", "_c10d_functional")
_SILENT = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "c10d::barrier")


def _group(said: Any) -> dist.ProcessGroup:
    group: dist.ProcessGroup = _resolve_process_group(said) if isinstance(said, str) else dist.ProcessGroup.unbox(said)  # type: ignore[arg-type]
    return group


def _wire(operation: Operation, tensor: Tensor, args: tuple[Any, ...], group: dist.ProcessGroup) -> int:
    """Bytes on the wire."""
    ranks = group.size()
    if operation == "all-reduce":
        return wire.all_reduce(tensor.nbytes, ranks)
    if operation == "all-gather":
        return wire.all_gather(tensor.nbytes, ranks)
    if operation == "list-gather":
        return wire.all_gather(tensor.nbytes * ranks, ranks)
    if operation == "reduce-scatter":
        return wire.reduce_scatter(tensor.nbytes, ranks)
    if operation == "broadcast":
        return tensor.nbytes
    row = tensor.element_size() * tensor[:0].new_empty(1, *tensor.shape[1:]).numel()
    arriving, sent = ([rows * row for rows in sizes] for sizes in args[1:3])
    return wire.all_to_all(sent, arriving, group.rank())


def _number(sent: Tensor) -> float | None:
    """The number that a fake tensor stands for, if it is known."""
    known = sent.constant if isinstance(sent, FakeTensor) else None
    if known is None:
        return None
    with no_dispatch():
        return known.item()
