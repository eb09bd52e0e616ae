"""Carrying tokens to their experts' rows and back, forward and backward without atomics.

Shapes: T tokens, D width, E experts, K choices of a token, N = T x K rows sorted by expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmoe_core.moe.plan import RoutingPlan, inverse


@dataclass(frozen=True)
class Order:
    """The kept choices of a plan sorted by expert, the dropped ones after them."""

    choice_N: Tensor
    """Which choice (token * K + k) stands in each row."""
    row_TK: Tensor
    """In which row each choice stands."""
    offsets_E: Tensor
    """End of each expert's rows (int32)."""


def order_of(plan: RoutingPlan) -> Order:
    """Sort the choices of a plan by expert; within an expert the tokens stand as in the group."""
    num_experts = plan.num_experts
    key_N = plan.expert_TK.masked_fill(~plan.kept_TK, num_experts).reshape(-1)
    sorted_N, choice_N = key_N.sort(stable=True)
    experts_E = torch.arange(num_experts, device=key_N.device)
    return Order(
        choice_N=choice_N,
        row_TK=inverse(choice_N).view_as(plan.expert_TK),
        offsets_E=torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True),
    )


def dispatch(x_TD: Tensor, order: Order) -> Tensor:
    """Copy each token to the rows of its choices: (T, D) -> (N, D)."""
    rows_ND: Tensor = _Dispatch.apply(x_TD, order.choice_N, order.row_TK)  # type: ignore[no-untyped-call]
    return rows_ND


def combine(rows_ND: Tensor, weight_TK: Tensor, order: Order) -> Tensor:
    """Weighted sum of each token's rows: (N, D), (T, K) -> (T, D) in the dtype of the rows."""
    y_TD: Tensor = _Combine.apply(rows_ND, weight_TK, order.choice_N, order.row_TK)  # type: ignore[no-untyped-call]
    return y_TD


def _sum_choices(rows_ND: Tensor, row_TK: Tensor) -> Tensor:
    """Sum of the rows of each token (T, D)."""
    taken_ND = rows_ND.index_select(0, row_TK.reshape(-1))
    return taken_ND if row_TK.shape[1] == 1 else taken_ND.view(*row_TK.shape, rows_ND.shape[1]).sum(dim=1)


class _Dispatch(torch.autograd.Function):
    """index_select's own gradient adds with atomics; the known inverse makes it a gather."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, choice_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, choice_N // row_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _sum_choices(grad_ND, row_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_TK: Tensor, choice_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_TK, choice_N, row_TK)
        weight_N1 = weight_TK.reshape(-1, 1).to(rows_ND.dtype)
        taken_ND = rows_ND.index_select(0, row_TK.reshape(-1)).mul_(weight_N1)
        return taken_ND if row_TK.shape[1] == 1 else taken_ND.view(*row_TK.shape, rows_ND.shape[1]).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_ND, weight_TK, choice_N, row_TK = ctx.saved_tensors
        weight_N1 = weight_TK.reshape(-1, 1).index_select(0, choice_N).to(rows_ND.dtype)
        grad_ND = grad_TD.index_select(0, choice_N // row_TK.shape[1])
        dot_N = torch.bmm(grad_ND.unsqueeze(1), rows_ND.unsqueeze(2)).view(-1)
        grad_weight_TK = dot_N.index_select(0, row_TK.reshape(-1)).view_as(row_TK).to(weight_TK.dtype)
        return grad_ND.mul_(weight_N1), grad_weight_TK, None, None
