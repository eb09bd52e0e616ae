"""The specification of the experts: one after the other, each over its kept tokens. Any dtype, any device.

Shapes: T tokens, D width, H hidden width, K choices of a token, C = T x K choices, M of one expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.moe.experts import ExpertNorm, Linear
from vlmoe_core.moe.plan import Assignment


def run(
    x_TD: Tensor,
    plan: Assignment,
    up: Linear,
    down: Linear,
    dropout_CH: Tensor | None,
    norm: ExpertNorm | None = None,
) -> Tensor:
    """The weighted sum over each token's kept choices, added in the order of the choices: (T, D) -> (T, D)."""
    out_CD = x_TD.new_zeros(plan.expert_TK.numel(), x_TD.shape[1])
    experts = zip(*(t.unbind(0) for t in (*up, *down)), strict=True)
    for e, (up_weight, up_bias, down_weight, down_bias) in enumerate(experts):
        token_M, number_M = torch.where((plan.expert_TK == e) & plan.kept_TK)
        choice_M = token_M * plan.top_k + number_M
        hidden_MH = F.gelu(F.linear(x_TD[token_M], up_weight, up_bias))
        if dropout_CH is not None:
            hidden_MH = hidden_MH * dropout_CH[choice_M]
        if norm is not None:
            hidden_MH = norm(hidden_MH, e)
        out_MD = F.linear(hidden_MH, down_weight, down_bias)
        weight_M1 = plan.weight_TK[token_M, number_M].unsqueeze(1).to(out_MD.dtype)
        out_CD = out_CD.index_copy(0, choice_M, weight_M1 * out_MD)
    return out_CD if plan.top_k == 1 else out_CD.view(*plan.expert_TK.shape, x_TD.shape[1]).sum(dim=1)
