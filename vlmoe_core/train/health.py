"""How the experts of each sparse layer are used, summed over the micro-batches and ranks of one step."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmoe_core.model.block import Routed
from vlmoe_core.moe.health import health_of, tally
from vlmoe_core.train.parallel import all_sum, wide_dtype


class RouterHealth:
    """Tallies of expert use, from the plans that computed the outputs."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, routed: Iterable[Routed]) -> None:
        """Add the plans of one micro-batch. Waits for no device."""
        for one in routed:
            key = f"router/{one.modality}/{one.layer}"
            counts = tally(one.plan)
            counts = counts.to(wide_dtype(counts.device))
            self.tallies[key] = self.tallies[key] + counts if key in self.tallies else counts

    def summary(self) -> dict[str, float]:
        """Figures of every sparse layer over all ranks: `router/<modality>/<layer>/{busiest,dead,dropped,entropy}`.

        A layer that no token came to is left out.
        """
        figures: dict[str, float] = {}
        for key in sorted(self.tallies):
            counts = all_sum(self.tallies[key])
            if counts[-1] > 0:
                figures |= {f"{key}/{name}": float(value) for name, value in health_of(counts).items()}
        return figures


def dead_experts(figures: Mapping[str, float]) -> dict[str, int]:
    """The layers with experts that no token chose, and how many each has."""
    return {key.removesuffix("/dead"): int(n) for key, n in figures.items() if key.endswith("/dead") and n > 0}
