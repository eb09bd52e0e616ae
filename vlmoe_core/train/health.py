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
        self.groups: dict[str, str] = {}
        """Tokens and effective capacity of the latest group of each sparse layer, in words."""

    @torch.no_grad()
    def add(self, routed: Iterable[Routed]) -> None:
        """Add the plans of one micro-batch. Waits for no device."""
        for one in routed:
            key = f"router/{one.modality}/{one.layer}"
            counts = tally(one.plan)
            counts = counts.to(wide_dtype(counts.device))
            self.tallies[key] = self.tallies[key] + counts if key in self.tallies else counts
            if tokens := one.plan.expert_TK.shape[0]:
                places = "dropless" if one.plan.capacity is None else f"{one.plan.capacity:,} places an expert"
                self.groups[key] = f"{tokens:,} tokens to {one.plan.num_experts} experts, {places}"

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


class Alarm:
    """Tells of experts that stay without tokens: one quiet step is chance, two logged steps in a row are a death."""

    def __init__(self) -> None:
        self.quiet: dict[str, int] = {}
        self.dead: dict[str, int] = {}

    def messages(self, figures: Mapping[str, float]) -> list[str]:
        """What to say after a logged step: a line for each layer in which more experts are dead than before."""
        quiet = {k.removesuffix("/dead"): int(n) for k, n in figures.items() if k.endswith("/dead") and n > 0}
        dead = {layer: min(n, self.quiet[layer]) for layer, n in quiet.items() if layer in self.quiet}
        told = [
            f"{layer}: {n} {'expert' if n == 1 else 'experts'} got no token at two logged steps in a row"
            for layer, n in dead.items()
            if n > self.dead.get(layer, 0)
        ]
        self.quiet, self.dead = quiet, dead
        return told
