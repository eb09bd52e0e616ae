"""The experts of a sparse layer: one feed-forward network each, their weights fused along the first axis.

Shapes: T tokens, D width, H hidden width, E experts, K choices of a token, N = T x K rows sorted by expert;
O and I are the output and input width of a linear map.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.moe.grouped import grouped_mm
from vlmoe_core.moe.permute import combine, dispatch, order_of
from vlmoe_core.moe.plan import RoutingPlan
from vlmoe_core.moe.precision import compute_dtype, without_autocast

Implementation = Literal["grouped", "loop"]


class ExpertLinear(nn.Module):
    """One linear map an expert: weight (E, O, I), bias (E, O).

    Beside the master weight it may hold a copy of lower precision, so that a step under autocast casts no weight. The
    copy is no part of the state; whoever changes the master calls `refresh_copy`.
    """

    def __init__(self, num_experts: int, in_width: int, out_width: int, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_width, in_width))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_width))
        self.copy: Tensor | None
        self.register_buffer("copy", None, persistent=False)
        nn.init.trunc_normal_(self.weight, std=init_std)

    def hold_copy(self, dtype: torch.dtype | None) -> None:
        """Hold a copy of the weight in `dtype`; None, or the weight's own dtype, holds none."""
        self.copy = None if dtype in (None, self.weight.dtype) else self.weight.detach().to(dtype)

    def refresh_copy(self) -> None:
        """Bring the copy, if there is one, up to the weight."""
        if self.copy is not None:
            self.copy.copy_(self.weight.detach())

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in the dtype of the arithmetic; their gradients reach the parameters."""
        if self.copy is not None and self.copy.dtype == dtype:
            weight: Tensor = _Held.apply(self.weight, self.copy)  # type: ignore[no-untyped-call]
            return weight, self.bias.to(dtype)
        return self.weight.to(dtype), self.bias.to(dtype)


class _Held(torch.autograd.Function):
    """Compute with the copy, hand the gradient to the master in the master's dtype."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class Experts(nn.Module):
    """E feed-forward networks down(gelu(up(x))), each applied to the tokens that a plan sends to it.

    `loop` computes one expert after the other and specifies the result; `grouped` sorts the tokens by expert and
    computes all experts in one product. A dropped token gets 0.
    """

    def __init__(
        self, num_experts: int, dim: int, hidden: int, *, init_std: float, implementation: Implementation = "grouped"
    ) -> None:
        super().__init__()
        self.implementation = implementation
        self.up = ExpertLinear(num_experts, dim, hidden, init_std)
        self.down = ExpertLinear(num_experts, hidden, dim, init_std)

    def forward(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """x_TD (T, D) -> the weighted sum of each token's experts (T, D), in the dtype of the arithmetic."""
        dtype = compute_dtype(self.up.weight)
        run = loop if self.implementation == "loop" else grouped
        with without_autocast(x_TD.device.type):
            return run(x_TD.to(dtype), plan, self.up.operands(dtype), self.down.operands(dtype))

    def hold_copies(self, dtype: torch.dtype | None) -> None:
        """Hold copies of the weights in `dtype` for arithmetic in it; None holds none."""
        self.up.hold_copy(dtype)
        self.down.hold_copy(dtype)

    def refresh_copies(self) -> None:
        """Bring the copies up to the weights: after each optimiser step and after loading."""
        self.up.refresh_copy()
        self.down.refresh_copy()


def grouped(x_TD: Tensor, plan: RoutingPlan, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> Tensor:
    """All experts at once: sort the tokens by expert, two grouped products, back. `up`, `down`: weight and bias."""
    order = order_of(plan)
    hidden_NH = F.gelu(_linear(dispatch(x_TD, order), up, order.offsets_E))
    return combine(_linear(hidden_NH, down, order.offsets_E), plan.weight_TK, order)


def _linear(x_NI: Tensor, weights: tuple[Tensor, Tensor], offsets_E: Tensor) -> Tensor:
    weight_EOI, bias_EO = weights
    y_NO: Tensor = grouped_mm(x_NI, weight_EOI.transpose(1, 2), offsets_E, bias_EO)
    return y_NO


def loop(x_TD: Tensor, plan: RoutingPlan, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> Tensor:
    """The specification: one expert after the other, each over its kept tokens. `up`, `down`: weight and bias."""
    y_TD = torch.zeros_like(x_TD)
    experts = zip(*(t.unbind(0) for t in (*up, *down)), strict=True)
    for e, (up_weight, up_bias, down_weight, down_bias) in enumerate(experts):
        token_M, choice_M = torch.where((plan.expert_TK == e) & plan.kept_TK)
        hidden_MH = F.gelu(F.linear(x_TD[token_M], up_weight, up_bias))
        out_MD = F.linear(hidden_MH, down_weight, down_bias)
        weight_M1 = plan.weight_TK[token_M, choice_M].unsqueeze(1).to(out_MD.dtype)
        y_TD = y_TD.index_add(0, token_M, weight_M1 * out_MD)
    return y_TD
