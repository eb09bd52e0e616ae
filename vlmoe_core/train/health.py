"""How the experts of each sparse layer are used, summed over the micro-batches and ranks of one step."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe_core.data.config import StreamName
from vlmoe_core.model.block import Routed
from vlmoe_core.moe.health import chosen, health_of, tally
from vlmoe_core.train.parallel import all_sum, gather_objects, wide_dtype


class RouterHealth:
    """Tallies of expert use, from the plans that computed the outputs."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tensor] = {}
        self.groups: dict[str, str] = {}
        """Tokens and effective capacity of the latest group of each sparse layer and stream, in words."""

    @torch.no_grad()
    def add(self, routed: Iterable[tuple[StreamName, Routed]]) -> None:
        """Add the plans of one micro-batch, each with its stream. Waits for no device."""
        for stream, one in routed:
            key = f"router/{one.pool}/{one.layer}"
            counts = tally(one.plan)
            counts = counts.to(wide_dtype(counts.device))
            self.tallies[key] = self.tallies[key] + counts if key in self.tallies else counts
            if tokens := one.plan.expert_TK.shape[0]:
                places = "dropless" if one.plan.capacity is None else f"{one.plan.capacity:,} places an expert"
                self.groups[f"{key}, {stream} stream"] = (
                    f"{tokens:,} tokens to {one.plan.num_experts} experts, {places}"
                )

    def summary(self) -> "HealthSummary":
        """What all ranks' tallies say; a layer that no token came to is left out. All ranks call it."""
        figures: dict[str, float] = {}
        idle: dict[str, frozenset[int]] = {}
        for key, tally_of in sorted(self._of_all_ranks().items()):
            counts = all_sum(tally_of)
            if counts[-1] > 0:
                figures |= {f"{key}/{name}": float(value) for name, value in health_of(counts).items()}
                idle[key] = frozenset(torch.nonzero(chosen(counts) == 0)[:, 0].tolist())
        return HealthSummary(figures, idle)

    def _of_all_ranks(self) -> dict[str, Tensor]:
        """The tallies, with zeros for layers that ran on other ranks only: all ranks must reduce the same ones."""
        like = next(iter(self.tallies.values()), torch.zeros(0, dtype=wide_dtype(torch.device("cpu"))))
        sizes = {key: tallies.shape[0] for key, tallies in self.tallies.items()}
        everywhere = {key: size for known in gather_objects(sizes) for key, size in known.items()}
        return {key: self.tallies.get(key, like.new_zeros(size)) for key, size in everywhere.items()}


@dataclass(frozen=True)
class HealthSummary:
    """The routers' health at one step."""

    figures: Mapping[str, float]
    """`router/<pool>/<layer>/{busiest,dead,dropped,entropy}`."""
    idle: Mapping[str, frozenset[int]]
    """The experts of each layer that no token chose."""


class Alarm:
    """Tells of experts that stay without tokens: one idle step is chance, two logged steps in a row are a death."""

    def __init__(self) -> None:
        self.idle: Mapping[str, frozenset[int]] = {}
        self.dead: dict[str, frozenset[int]] = {}

    def messages(self, idle: Mapping[str, frozenset[int]]) -> list[str]:
        """What to say after a logged step: a line for each layer in which an expert died."""
        dead = {layer: experts & self.idle.get(layer, frozenset()) for layer, experts in idle.items()}
        told = []
        for layer, experts in dead.items():
            if died := sorted(experts - self.dead.get(layer, frozenset())):
                names = ", ".join(map(str, died))
                told.append(f"{layer}: no token chose expert {names} at two logged steps in a row")
        self.idle, self.dead = idle, dead
        return told
