"""The balance losses of all sparse layers of a model, as parts of the loss.

Axis letter: S numbers of a statistic.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.block import Routed
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.config import BalanceConfig, MoEConfig, SharedMoEConfig
from vlmoe_core.moe.losses import num_statistics, statistics, weighted_sum
from vlmoe_core.moe.plan import RoutingPlan
from vlmoe_core.moe.scope import over_ranks
from vlmoe_core.objectives.loss import Part

STREAMS_OF: Mapping[str, tuple[StreamName, ...]] = {
    "vision": ("image", "pair"),
    "text": ("text", "pair"),
    "shared": ("image", "text", "pair"),
}
"""The streams that hold tokens of a modality, or of any."""


@dataclass(frozen=True)
class Site:
    """A sparse layer and the tokens in it that one set of losses balances."""

    layer: int
    """0-based block."""
    pool: str
    """Whose experts: vision, text or shared."""
    tokens: str
    """Which of the pool's tokens: vision, text, or shared for all."""
    losses: BalanceConfig
    """Weights; at least one is not 0."""
    streams: tuple[StreamName, ...]
    """The streams whose tokens pass the layer."""

    @property
    def name(self) -> str:
        """The part of the loss: balance/<tokens>/<layer>."""
        return f"balance/{self.tokens}/{self.layer}"

    def num_tokens(self, batch: Batch) -> int:
        """Tokens of a batch that are balanced here: a number above 0 where there are any, told from the batch alone."""
        images = batch.num_images if self.tokens != "text" else 0
        return images + (batch.text_ids_T.shape[0] if self.tokens != "vision" else 0)

    def plan(self, routed: Sequence[Routed]) -> RoutingPlan | None:
        """The plan for those tokens, out of what one stream went through; None where the layer did not run."""
        for one in routed:
            if (one.pool, one.layer) == (self.pool, self.layer):
                images, tokens = one.num_image_tokens, one.plan.expert_TK.shape[0]
                spans = {"vision": (0, images), "text": (images, tokens), "shared": (0, tokens)}
                return one.plan.tokens(*spans[self.tokens])
        return None


class Balance:
    """The balance losses of a model.

    The term of a site is the mean over its non-empty groups; a group is what one micro-batch of one stream brings.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.pools = config.pools
        self.sites = tuple(_sites(config))

    def counts(self, batches: Mapping[StreamName, Batch]) -> dict[str, int]:
        """The non-empty groups of each site, from the batches alone."""
        return {
            site.name: sum(site.num_tokens(batches[s]) > 0 for s in site.streams if s in batches) for site in self.sites
        }

    def parts(
        self, batches: Mapping[StreamName, Batch], routed: Mapping[StreamName, Sequence[Routed]]
    ) -> dict[str, Part]:
        """One part a site: the sum over its groups.

        Args:
            batches: the micro-batch.
            routed: the plans of each of its streams.
        """
        groups = [(site, stream) for site in self.sites for stream in site.streams if stream in batches]
        has_tokens = [site.num_tokens(batches[stream]) > 0 for site, stream in groups]
        known = [self._statistics(site, batches[stream], routed[stream]) for site, stream in groups]
        totals = self._over_scope(groups, known, has_tokens)
        sums: dict[str, list[Tensor]] = {}
        for (site, _), total, has in zip(groups, totals, has_tokens, strict=True):
            experts = self.pools[site.pool].num_experts
            sums.setdefault(site.name, []).append(weighted_sum(total, site.losses, experts) * has)
        counts = self.counts(batches)
        sites = {site.name: site for site in self.sites}
        return {
            name: Part(torch.stack(values).sum(), counts[name], 1.0, sites[name].streams)
            for name, values in sums.items()
        }

    def _statistics(self, site: Site, batch: Batch, routed: Sequence[Routed]) -> Tensor:
        plan = site.plan(routed)
        if plan is not None:
            return statistics(plan, site.losses)
        size = num_statistics(site.losses, self.pools[site.pool].num_experts)
        return torch.zeros(size, device=batch.text_ids_T.device)

    def _over_scope(
        self, groups: Sequence[tuple[Site, StreamName]], known: Sequence[Tensor], has_tokens: Sequence[bool]
    ) -> list[Tensor]:
        """The statistics that each group's loss is taken from: its own, or the sum over ranks."""
        totals = list(known)
        shared = [i for i, (site, _) in enumerate(groups) if self.pools[site.pool].balance_scope == "ranks"]
        if shared:
            summed = over_ranks([known[i] for i in shared], [has_tokens[i] for i in shared])
            for i, total in zip(shared, summed, strict=True):
                totals[i] = total
        return totals


def _sites(config: ModelConfig) -> Iterator[Site]:
    single = config.layers - config.vl_layers
    for pool, moe in config.pools.items():
        for layer in config.sparse_layers(pool):
            for tokens, losses in _sets(pool, moe).items():
                streams = tuple(s for s in STREAMS_OF[tokens] if s != "pair" or layer < single)
                if losses.weights:
                    yield Site(layer, pool, tokens, losses, streams)


def _sets(pool: str, moe: MoEConfig) -> dict[str, BalanceConfig]:
    """The sets of losses of a pool, by the tokens that they balance."""
    own = {pool: moe.balance}
    return own | {"vision": moe.vision_balance, "text": moe.text_balance} if isinstance(moe, SharedMoEConfig) else own
