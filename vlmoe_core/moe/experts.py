"""The experts of a sparse layer: one feed-forward network each, their weights fused along the first axis.

Shapes: T tokens, D width, H hidden width, E experts, K choices of a token, C = T x K choices;
O and I are the output and input width of a linear map.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.config import plugin_module
from vlmoe_core.moe.config import Implementation
from vlmoe_core.moe.exchange import Exchange, Journey
from vlmoe_core.moe.pages import empty_like
from vlmoe_core.moe.plan import Assignment
from vlmoe_core.moe.precision import compute_dtype, without_autocast
from vlmoe_core.moe.share import Share, whole
from vlmoe_core.moe.uncompiled import uncompiled

IMPLEMENTATIONS = "vlmoe_core.moe.implementations"
"""Where the implementations lie, a file each with a function `run`; `run_in_group` too, if it brings its exchange."""

Linear = tuple[Tensor, Tensor]
"""Weight (E, O, I) and bias (E, O) in the dtype of the arithmetic."""


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

    def operands(self, dtype: torch.dtype) -> Linear:
        """Weight and bias in the dtype of the arithmetic; their gradients reach the parameters."""
        if self.copy is not None and self.copy.dtype == dtype:
            weight: Tensor = _Held.apply(self.weight, self.copy)  # type: ignore[no-untyped-call]
            return weight, self.bias.to(dtype)
        return self.weight.to(dtype), self.bias.to(dtype)


class ExpertNorm(nn.Module):
    """One LayerNorm an expert: weight and bias (E, H)."""

    def __init__(self, num_experts: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_experts, hidden))
        self.bias = nn.Parameter(torch.zeros(num_experts, hidden))

    def forward(self, x_MH: Tensor, expert: int) -> Tensor:
        """The hidden activations of one expert, normalised in float32 or more: (M, H) -> (M, H)."""
        x, weight, bias = (
            t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x_MH, self.weight[expert], self.bias[expert])
        )
        return F.layer_norm(x, weight.shape, weight, bias, self.eps).to(x_MH.dtype)


class _Held(torch.autograd.Function):
    """Compute with the copy, hand the gradient to the master in the master's dtype."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return empty_like(grad, ctx.dtype).copy_(grad), None


class Experts(nn.Module):
    """E feed-forward networks down(gelu(up(x))), each applied to the tokens that a plan sends to it.

    `loop` computes one expert after the other and specifies the result; `grouped` computes all in one operator; `tutel`
    moves the tokens with that package's kernels. A dropped token gets 0.

    Args:
        num_experts: E.
        dim: D.
        hidden: H.
        init_std: standard deviation of the weights.
        implementation: which of the three.
        dropout: rate of dropout on the hidden activation, in training; not with `tutel`.
        sub_norm_eps: each expert has a LayerNorm of this epsilon before `down` (Magneto, arXiv 2210.06423); null: none.
            With `loop` alone.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        init_std: float,
        implementation: Implementation = "grouped",
        dropout: float = 0.0,
        sub_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.implementation, self.dropout = implementation, dropout
        self.share = whole(num_experts)
        self.exchange: Exchange | None = None
        self.up = ExpertLinear(num_experts, dim, hidden, init_std)
        self.norm = None if sub_norm_eps is None else ExpertNorm(num_experts, hidden, sub_norm_eps)
        self.down = ExpertLinear(num_experts, hidden, dim, init_std)

    def forward(self, x_TD: Tensor, plan: Assignment, beside: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x_TD (T, D) -> the weighted sum of each token's experts (T, D), in the dtype of the arithmetic.

        Args:
            x_TD: the tokens of one routing group.
            plan: where each goes.
            beside: what is added to the sum, from the tokens; computed while they travel to other processes.
        """
        operand_TD = x_TD.to(compute_dtype(self.up.weight))
        added = None if beside is None else partial(beside, x_TD)
        if self.exchange is not None:
            return uncompiled(self._run_shared)(operand_TD, plan, self.exchange, added)
        added_TD = None if added is None else added()
        with without_autocast(x_TD.device.type):
            y_TD = self._run(operand_TD, plan, self._dropout(operand_TD, plan))
        return y_TD if added_TD is None else y_TD + added_TD

    @property
    def implementation(self) -> Implementation:
        """Which implementation computes; it may be changed at any time."""
        return self._implementation

    @implementation.setter
    def implementation(self, name: Implementation) -> None:
        self._implementation = name
        module = plugin_module(IMPLEMENTATIONS, name)
        self._compute: Callable[..., Tensor] = module.run
        self._compute_in_group: Callable[..., Tensor] | None = getattr(module, "run_in_group", None)

    @torch.no_grad()
    def keep(self, share: Share, exchange: Exchange) -> None:
        """Keep the weights of a share alone, in memory of its own size, and compute with those of the other processes.

        Args:
            share: which experts stay.
            exchange: brings tokens to the processes of its group; each holds a share, in the order of their ranks.
        """
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                kept = parameter[share.first : share.first + share.count].clone()
                setattr(module, name, nn.Parameter(kept, parameter.requires_grad))
        self.share, self.exchange = share, exchange

    def hold_copies(self, dtype: torch.dtype | None) -> None:
        """Hold copies of the weights in `dtype` for arithmetic in it; None holds none."""
        self.up.hold_copy(dtype)
        self.down.hold_copy(dtype)

    def refresh_copies(self) -> None:
        """Bring the copies up to the weights: after each optimiser step and after loading."""
        self.up.refresh_copy()
        self.down.refresh_copy()

    def _run(self, x_TD: Tensor, plan: Assignment, dropout_CH: Tensor | None) -> Tensor:
        """The experts of this process: (T, D) -> (T, D)."""
        up, down = self.up.operands(x_TD.dtype), self.down.operands(x_TD.dtype)
        further = () if self.norm is None else (self.norm,)
        y_TD: Tensor = self._compute(x_TD, plan, up, down, dropout_CH, *further)
        return y_TD

    def _run_shared(
        self, x_TD: Tensor, plan: Assignment, exchange: Exchange, beside: Callable[[], Tensor] | None
    ) -> Tensor:
        """As `forward`, with the experts of all processes of the group; `beside` is computed while tokens travel."""
        with without_autocast(x_TD.device.type):
            journey = None if self._compute_in_group else exchange.send(x_TD, plan)
        added_TD = None if beside is None else beside()
        with without_autocast(x_TD.device.type):
            if journey is None:
                y_TD = self._run_in_group(x_TD, plan, exchange)
            else:
                y_TD = self._run_elsewhere(x_TD, plan, exchange, journey)
        return y_TD if added_TD is None else y_TD + added_TD

    def _run_in_group(self, x_TD: Tensor, plan: Assignment, exchange: Exchange) -> Tensor:
        """The implementation moves the tokens itself: (T, D) -> (T, D)."""
        assert self._compute_in_group is not None
        up, down = self.up.operands(x_TD.dtype), self.down.operands(x_TD.dtype)
        return self._compute_in_group(x_TD, plan, up, down, exchange.group)

    def _run_elsewhere(self, x_TD: Tensor, plan: Assignment, exchange: Exchange, journey: Journey) -> Tensor:
        """The experts of this process for the rows that arrived, and their outputs sent back: (T, D) -> (T, D)."""
        dropout_CH = self._dropout(x_TD, plan)
        if dropout_CH is not None:
            # Drawn where the tokens are, so that the draws do not depend on the number of processes.
            kept_RH = exchange.send_along((dropout_CH != 0).to(torch.uint8), journey)
            dropout_CH = kept_RH.to(x_TD.dtype) / (1 - self.dropout)
        out_RD = self._run(journey.rows_RD, journey.arrivals, dropout_CH)
        return exchange.send_back(out_RD, journey, plan)

    def _dropout(self, x_TD: Tensor, plan: Assignment) -> Tensor | None:
        """(C, H) factors of the hidden activation, 0 or 1 / (1 - rate); the same for every implementation."""
        if not self.training or self.dropout == 0:
            return None
        return F.dropout(x_TD.new_ones(plan.expert_TK.numel(), self.up.weight.shape[1]), self.dropout)


def expert_shares(module: nn.Module) -> dict[str, Share]:
    """The share of each group of experts below a module, by its dotted name (`encoder.blocks.3.ffn.vision.experts`)."""
    return {name: inner.share for name, inner in module.named_modules() if isinstance(inner, Experts)}
