"""Bytes of all tensors that are alive at one time, by the part of the program that made them."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

Scratch = Callable[[Any, tuple[Any, ...]], int]
"""(operator, its arguments) -> bytes that it takes for itself while it runs."""
RESIZING = ("c10d", "fsdp")
"""Operators around which fully_shard gives back, and takes again, the memory of tensors that stay."""


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if isinstance(tensor, DTensor):
        local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        return local
    return tensor


@dataclass
class _Seen:
    """Memory that is followed."""

    part: str
    size: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operator inside, and counts the memory that its results lie in until nobody holds it any more.

    Args:
        known: tensors whose memory is left out.
        scratch: what operators take beside their results.
    """

    def __init__(self, known: Iterable[Tensor], scratch: Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "other"
        """Who makes tensors now."""
        self.alive: Counter[str] = Counter()
        """Bytes alive, by part."""
        self.peak = 0
        """The most bytes that were alive at one time."""
        self._scratch = scratch
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[held(tensor).untyped_storage()] = None

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.alive.values())

    def move(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count the memory of these tensors to another part than that which made them."""
        for tensor in tensors:
            seen: _Seen | None = self._seen.get(held(tensor).untyped_storage())  # type: ignore[no-untyped-call]
            if seen is not None:
                self.alive[seen.part] -= seen.size
                self.alive[part] += seen.size
                seen.part = part

    def measure(self) -> None:
        """Look at the size of all memory once more."""
        for storage, seen in list(self._seen.items()):  # type: ignore[no-untyped-call]
            if seen is not None and storage.nbytes() != seen.size:
                self.alive[seen.part] += storage.nbytes() - seen.size
                seen.size = storage.nbytes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, and count what it made."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, Tensor):
                self._add(held(tensor))
        if func.namespace in RESIZING:
            self.measure()
        self.peak = max(self.peak, self.total + self._scratch(func, args))
        return results

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        seen = self._seen[storage] = _Seen(self.part, storage.nbytes())
        self.alive[seen.part] += seen.size
        weakref.finalize(storage, self._remove, seen)

    def _remove(self, seen: _Seen) -> None:
        self.alive[seen.part] -= seen.size
