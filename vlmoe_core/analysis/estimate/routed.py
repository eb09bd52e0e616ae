"""Exchanges between processes whose sizes are assumed, since a rehearsal has no tokens that choose.

Shapes: T tokens of this process, K choices of a token, E experts on all processes, P processes of a group, L experts of
a process.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn

from vlmoe_core.moe.exchange import Exchange, Journey, Sizes
from vlmoe_core.moe.experts import Experts
from vlmoe_core.moe.plan import Assignment

Routing = Literal["even", "one-sided"]
"""even: all experts get the same; one-sided: the tokens of all processes choose experts of a group's first process, as
long as these have places."""


def even(plan: Assignment, ranks: int, rank: int) -> Sizes:
    """All experts get the same, as far as they have places.

    Args:
        plan: the choices of this process; those of the others are as many.
        ranks: P.
        rank: which of them this process is.
    """
    choices = plan.expert_TK.numel()
    sent = [_placed(plan, ranks, choices // ranks + (other < choices % ranks)) for other in range(ranks)]
    return Sizes(sent, [sent[rank]] * ranks)


def one_sided(plan: Assignment, ranks: int, rank: int) -> Sizes:
    """The first process gets all that its experts have places for, the others what is left.

    A token chooses no expert twice. Arguments as in `even`.
    """
    tokens, top_k = plan.expert_TK.shape
    first = _placed(plan, ranks, tokens * min(top_k, plan.num_experts // ranks))
    other = _placed(plan, ranks, (tokens * top_k - first) // (ranks - 1))
    sent = [first] + [other] * (ranks - 1)
    return Sizes(sent, [sent[rank]] * ranks)


def _placed(plan: Assignment, ranks: int, rows: int) -> int:
    """Rows to one process that its experts have places for."""
    return rows if plan.capacity is None else min(rows, plan.num_experts // ranks * plan.capacity)


ASSUMED: Mapping[Routing, Callable[[Assignment, int, int], Sizes]] = {"even": even, "one-sided": one_sided}


class AssumedExchange(Exchange):
    """An exchange whose sizes follow from the number of choices alone."""

    def __init__(self, group: dist.ProcessGroup, routing: Routing) -> None:
        super().__init__(group)
        self._routing = routing

    def send(self, x_TD: Tensor, plan: Assignment) -> Journey:
        """As that of `Exchange`."""
        return _Told(self.group, ASSUMED[self._routing](plan, self.group.size(), self.group.rank())).send(x_TD, plan)


class _Told(Exchange):
    """An exchange that knows its sizes."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sizes) -> None:
        super().__init__(group)
        self._sizes = sizes

    def sizes(self, counts_PL: Tensor, arriving_PL: Tensor) -> Sizes:
        """What it was told."""
        return self._sizes


def assume_routing(objective: nn.Module, routing: Routing) -> None:
    """Let all experts that are shared by processes exchange their tokens like that."""
    for module in objective.modules():
        if isinstance(module, Experts) and module.exchange is not None:
            module.exchange = AssumedExchange(module.exchange.group, routing)
