"""Copies of tensors in host memory, so that a run goes on while they are written."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlmoe_core.checkpoint.names import disk_names
from vlmoe_core.checkpoint.offers import Offers


class Snapshot:
    """The tensors that this process writes, as they were when they were taken, by their names on disk.

    There is one at a time: the next one is taken into the same memory, which is pinned for tensors of a GPU.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(
        self, tensors: Mapping[str, Tensor], offers: Offers, owned: Collection[str], written: Collection[str]
    ) -> Mapping[str, Tensor]:
        """Copy what this process owns. Processes that share sharded tensors call it together: one by one is gathered.

        Args:
            tensors: by their names in memory, in any order.
            offers: what was said of them.
            owned: the names on disk that this process writes.
            written: those that any process writes.
        """
        copies: dict[str, Tensor] = {}
        for name in sorted(tensors):  # all processes gather the same tensor at the same time
            tensor = tensors[name]
            rows = disk_names(name, offers.tensors[name].share)
            if not any(key in written for key in rows):
                continue
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for key, row in rows.items():
                if key in owned:
                    copies[key] = self._copy(key, full if row is None else full[row])
        if any(copy.is_pinned() for copy in copies.values()):
            torch.cuda.synchronize()
        self._copies = copies
        return copies

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(key)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return copy.copy_(tensor, non_blocking=tensor.is_cuda)
