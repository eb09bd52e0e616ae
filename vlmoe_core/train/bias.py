"""Loss-free balancing in training: the biases of all `bias-balanced` routers, updated once a step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlmoe_core.model.block import Block, Routed
from vlmoe_core.moe.health import chosen, tally
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.routers import bias_balanced
from vlmoe_core.train.parallel import all_sum, wide_dtype

Site = tuple[str, int]
"""Pool and 0-based block."""


class RouterBiases:
    """Counts the choices of a step over its micro-batches and ranks, so that the update depends on neither."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = dict(_routers(model))
        self.counts: dict[Site, Tensor] = {}

    @torch.no_grad()
    def add(self, routed: Iterable[Routed]) -> None:
        """Count the choices of one micro-batch. Waits for no device."""
        for one in routed:
            site = (one.pool, one.layer)
            if site in self.routers:
                counts = chosen(tally(one.plan)).to(wide_dtype(one.plan.expert_TK.device))
                self.counts[site] = self.counts[site] + counts if site in self.counts else counts

    @torch.no_grad()
    def update(self) -> None:
        """Move every bias by the counts of all ranks, and begin the next step. All ranks call it."""
        for site, router in self.routers.items():
            counts = self.counts.pop(site, None)
            if counts is None:
                counts = torch.zeros_like(router.bias, dtype=wide_dtype(router.bias.device))
            router.update(all_sum(counts))

    def forget(self) -> None:
        """Begin the next step without an update."""
        self.counts.clear()


def _routers(model: nn.Module) -> Iterable[tuple[Site, bias_balanced.Router]]:
    """Those that are trained: a frozen router keeps its bias too."""
    for block in model.modules():
        if isinstance(block, Block):
            for pool, ffn in block.ffn.items():
                router = ffn.router if isinstance(ffn, SparseFFN) else None
                if isinstance(router, bias_balanced.Router) and any(p.requires_grad for p in router.parameters()):
                    yield (pool, block.layer), router
