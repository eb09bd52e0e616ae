"""Expert parallelism: tokens travel to the processes that hold their experts, and the outputs travel back.

Shapes: T tokens of this process, D width, H hidden width, K choices of a token, N kept choices, R rows that arrive,
P processes of the group, L experts of a process.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd

from vlmoe_core.moe.order import order_of
from vlmoe_core.moe.plan import Assignment, assign_slots


@dataclass(frozen=True)
class Sizes:
    """How many rows go to, and come from, each process of the group."""

    sent: list[int]
    """(P,) rows to each process."""
    arriving: list[int]
    """(P,) rows from each process."""


@dataclass(frozen=True)
class Arrivals:
    """The rows that came to this process, as an assignment to its own experts: one choice a row, all kept, weight 1."""

    expert_TK: Tensor
    """(R, 1) numbers from 0 among the experts of this process."""
    num_experts: int
    """L."""

    @property
    def capacity(self) -> None:
        """Whatever arrives is computed."""

    @property
    def top_k(self) -> int:
        """A row has one expert."""
        return 1

    @property
    def kept_TK(self) -> Tensor:
        """(R, 1) all."""
        return torch.ones_like(self.expert_TK, dtype=torch.bool)

    @property
    def weight_TK(self) -> Tensor:
        """(R, 1) ones: the weights stay with the tokens' own process."""
        return torch.ones_like(self.expert_TK, dtype=torch.float32)

    @property
    def slot_TK(self) -> Tensor:
        """(R, 1) place in the expert's queue, by arrival."""
        return assign_slots(self.expert_TK, None, self.num_experts)


@dataclass(frozen=True)
class Journey:
    """Rows on their way, and the way back."""

    rows_RD: Tensor
    """The tokens that arrive; whoever reads them waits for them."""
    arrivals: Arrivals
    """Which expert each is for."""
    choice_N: Tensor
    """Which choice (token * K + k) of this process each returning row belongs to."""
    sizes: Sizes
    """Rows by process."""


class Exchange:
    """The all-to-all of one group of processes, which together hold all experts, in the order of their ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def send(self, x_TD: Tensor, plan: Assignment) -> Journey:
        """Send each kept choice's token to its expert. All processes of the group call it, with tokens or without."""
        order = order_of(plan)
        counts_PL = torch.diff(order.offsets_E, prepend=order.offsets_E.new_zeros(1)).view(self.group.size(), -1)
        arriving_PL = self._swap(counts_PL)
        sizes = self.sizes(counts_PL, arriving_PL)
        choice_N = order.choice_N[: sum(sizes.sent)]
        rows_RD = self._travel(x_TD.index_select(0, choice_N // plan.top_k), sizes.sent, sizes.arriving)
        return Journey(rows_RD, _arrivals(arriving_PL, sum(sizes.arriving)), choice_N, sizes)

    def sizes(self, counts_PL: Tensor, arriving_PL: Tensor) -> Sizes:
        """The rows by process, known to the host: the one wait for the device."""
        sent, arriving = torch.stack([counts_PL.sum(1), arriving_PL.sum(1)]).tolist()
        return Sizes(sent, arriving)

    def send_along(self, rows_CH: Tensor, journey: Journey) -> Tensor:
        """Bring a row (H,) of each choice to where its token went: (T x K, H) -> (R, H). Without gradient."""
        rows_NH = rows_CH.index_select(0, journey.choice_N)
        return self._travel(rows_NH, journey.sizes.sent, journey.sizes.arriving)

    def send_back(self, out_RD: Tensor, journey: Journey, plan: Assignment) -> Tensor:
        """The outputs back at their tokens, weighted and summed over each token's kept choices: (R, D) -> (T, D)."""
        out_ND = self._travel(out_RD, journey.sizes.arriving, journey.sizes.sent)
        weight_N1 = plan.weight_TK.reshape(-1, 1).index_select(0, journey.choice_N)
        out_CD = out_ND.new_zeros(plan.expert_TK.numel(), out_ND.shape[1])
        out_CD = out_CD.index_copy(0, journey.choice_N, out_ND * weight_N1.to(out_ND.dtype))
        return out_CD if plan.top_k == 1 else out_CD.view(*plan.expert_TK.shape, out_CD.shape[1]).sum(dim=1)

    def _swap(self, counts_PL: Tensor) -> Tensor:
        """Row p of process q becomes row q of process p."""
        received: Tensor = all_to_all_single(counts_PL.contiguous(), None, None, self.group)
        return received

    def _travel(self, rows: Tensor, sent: list[int], arriving: list[int]) -> Tensor:
        found: Tensor = all_to_all_single_autograd(rows, arriving, sent, self.group)
        return found


def _arrivals(arriving_PL: Tensor, rows: int) -> Arrivals:
    """Rows come process by process, and from each sorted by expert."""
    num_experts = arriving_PL.shape[1]
    expert_PL = torch.arange(num_experts, device=arriving_PL.device).repeat(arriving_PL.shape[0])
    expert_R = expert_PL.repeat_interleave(arriving_PL.reshape(-1), output_size=rows)
    return Arrivals(expert_R.unsqueeze(1), num_experts)
