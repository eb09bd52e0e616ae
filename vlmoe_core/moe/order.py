"""The choices of a plan sorted by expert.

Shapes: T tokens, E experts, K choices of a token, N = T x K rows sorted by expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe_core.moe.plan import Assignment


@dataclass(frozen=True)
class Order:
    """The kept choices sorted by expert, the dropped ones after them."""

    choice_N: Tensor
    """Which choice (token * K + k) stands in each row (int64)."""
    offsets_E: Tensor
    """End of each expert's rows (int32)."""


def order_of(plan: Assignment) -> Order:
    """Sort the choices of a plan by expert; within an expert the tokens stand as in the group. Waits for no device."""
    num_experts = plan.num_experts
    key_N = plan.expert_TK.masked_fill(~plan.kept_TK, num_experts).reshape(-1)
    sorted_N, choice_N = key_N.sort(stable=True)
    experts_E = torch.arange(num_experts, device=key_N.device)
    return Order(choice_N, torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True))
