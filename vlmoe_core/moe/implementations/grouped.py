"""All experts in one operator, over the tokens sorted by expert.

Shapes: T tokens, D width, H hidden width, K choices of a token, C = T x K choices.
"""

import torch
from torch import Tensor

from vlmoe_core.moe.experts import Linear
from vlmoe_core.moe.operator import expert_ffn
from vlmoe_core.moe.order import order_of
from vlmoe_core.moe.plan import Assignment


def run(x_TD: Tensor, plan: Assignment, up: Linear, down: Linear, dropout_CH: Tensor | None) -> Tensor:
    """The weighted sum over each token's kept choices: (T, D) -> (T, D)."""
    order = order_of(plan)
    save = torch.is_grad_enabled()
    # A dropped choice counts nothing, be its weight not a number.
    weight_TK = plan.weight_TK if plan.capacity is None else plan.weight_TK.masked_fill(~plan.kept_TK, 0.0)
    out: tuple[Tensor, ...] = expert_ffn(x_TD, weight_TK, order.choice_N, order.offsets_E, *up, *down, dropout_CH, save)
    return out[0]
