"""Balance over ranks: the statistics of the groups that several processes compute at the same time, added up."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def over_ranks(statistics: Sequence[Tensor], has_tokens: Sequence[bool]) -> list[Tensor]:
    """The sum of each statistic over all ranks, as one all-reduce; every rank calls it with as many.

    A loss of the sums is the same on every rank whose own group has tokens, and all of these are added up. So the
    gradient of a rank's own statistic is that of its own loss times the number of such ranks: no communication in the
    backward pass. A rank without tokens must leave its loss out.

    Args:
        statistics: (S,) each; zeros where this rank has no tokens.
        has_tokens: whether this rank's group has tokens.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(statistics)
    flat = torch.cat(list(statistics))
    sums = torch.cat([flat.detach(), flat.new_tensor(has_tokens)])
    dist.all_reduce(sums)
    totals, ranks = sums[: flat.shape[0]], sums[flat.shape[0] :]
    sizes = [s.shape[0] for s in statistics]
    return [
        total + count * (own - own.detach())
        for own, total, count in zip(statistics, torch.split(totals, sizes), ranks.unbind(), strict=True)
    ]
