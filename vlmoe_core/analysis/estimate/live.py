"""Bytes of all tensors that are alive at one time, by the part of the program that made them."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

Scratch = Callable[[Any, tuple[Any, ...]], int]
"""(operator, its arguments) -> bytes that it takes for itself while it runs."""


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
            self._seen[tensor.untyped_storage()] = True

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.alive.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, and count what it made."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.total + self._scratch(func, args))
        return results

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        self.alive[self.part] += storage.nbytes()
        weakref.finalize(storage, self._remove, self.part, storage.nbytes())

    def _remove(self, part: str, size: int) -> None:
        self.alive[part] -= size
