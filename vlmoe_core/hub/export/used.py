"""Which experts a task uses, from the statistics of its routing. E: experts."""

from collections.abc import Mapping, Sequence

from vlmoe_core.analysis.routing.summary import RoutingSummary
from vlmoe_core.decimals import exact

Kept = Mapping[str, Mapping[int, tuple[int, ...]]]
"""The experts that stay, by pool and 0-based block; what is not named stays whole."""


def used_experts(summary: RoutingSummary, share: float = 0.99) -> Kept:
    """The smallest set of experts in each sparse layer that got this share of the tokens' choices.

    Choices count whether there was a place for them or not; tasks and modalities of a layer are added up. A layer that
    no token came to is not named.

    Args:
        summary: the routing of the task's data.
        share: above 0, at most 1.
    """
    wanted: dict[tuple[str, int], list[int]] = {}
    top_k: dict[str, int] = {}
    for cell in summary.cells:
        so_far = wanted.get((cell.pool, cell.layer), [0] * cell.num_experts)
        wanted[cell.pool, cell.layer] = [a + b for a, b in zip(so_far, cell.wanted, strict=True)]
        top_k[cell.pool] = cell.top_k
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (pool, layer), counts in sorted(wanted.items()):
        if any(counts):
            kept.setdefault(pool, {})[layer] = smallest_set(counts, share, top_k[pool])
    return kept


def smallest_set(counts_E: Sequence[int], share: float, least: int) -> tuple[int, ...]:
    """The fewest experts with this share of all counts, and no fewer than `least`; of equal ones those of lower number.

    The share is taken as it was written in decimal.
    """
    wanted, found = exact(share) * sum(counts_E), 0
    chosen: list[int] = []
    for expert in sorted(range(len(counts_E)), key=lambda e: (-counts_E[e], e)):
        if found >= wanted and len(chosen) >= least:
            break
        chosen.append(expert)
        found += counts_E[expert]
    return tuple(sorted(chosen))
