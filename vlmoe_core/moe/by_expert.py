"""One product an expert, on any device and in any dtype. Waits for the device once, for the experts' numbers of rows.

What lies between an expert's products stays in the processor's cache, which a dense network of the same work can't
offer. Shapes: vlmoe_core/moe/call.py; M rows of one expert.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmoe_core.moe import pages
from vlmoe_core.moe.call import Call
from vlmoe_core.moe.workers import for_each_expert


def forward(call: Call, up_EH: Tensor, down_ED: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' outputs (T, D); if `save`, hidden states before GELU (N, H) and unweighted outputs (N, D)."""
    x_TD, rows, hidden = call.x_TD, call.choice_N.shape[0], up_EH.shape[1]
    before_NH, out_ND = x_TD.new_empty(rows if save else 0, hidden), x_TD.new_empty(rows, x_TD.shape[1])
    ends = _ends(call)

    def expert(e: int) -> None:
        span = _span(ends, e)
        choice_M = call.choice_N[span]
        before_MH = before_NH[span] if save else x_TD.new_empty(choice_M.shape[0], hidden)
        torch.addmm(up_EH[e], x_TD.index_select(0, choice_M // call.top_k), call.up_EHD[e].t(), out=before_MH)
        torch.addmm(down_ED[e], call.activated(before_MH, choice_M), call.down_EDH[e].t(), out=out_ND[span])

    for_each_expert(expert, _sizes(ends), x_TD.device)
    before_NH[ends[-1] :].zero_()
    out_ND[ends[-1] :].zero_()
    y_TD = call.sum_choices(call.unsorted(out_ND).mul_(call.weight_C1))
    return y_TD, before_NH, out_ND if save else out_ND.new_empty(0, x_TD.shape[1])


def backward(call: Call, grad_TD: Tensor, before_NH: Tensor, out_ND: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x_TD, weight_TK, up_EHD, up_EH, down_EDH and down_ED."""
    x_TD, weight_N1 = call.x_TD, call.weight_C1.index_select(0, call.choice_N)
    grad_x_ND, grad_weight_N = torch.empty_like(out_ND), call.weight_TK.new_empty(out_ND.shape[0])
    up_EHD, down_EDH = pages.empty_like(call.up_EHD), pages.empty_like(call.down_EDH)
    up_EH, down_ED = x_TD.new_empty(up_EHD.shape[:2]), x_TD.new_empty(down_EDH.shape[:2])
    ends = _ends(call)

    def expert(e: int) -> None:
        span = _span(ends, e)
        choice_M, before_MH = call.choice_N[span], before_NH[span]
        token_M = choice_M // call.top_k
        grad_MD = grad_TD.index_select(0, token_M)
        torch.sum(grad_MD * out_ND[span], 1, dtype=grad_weight_N.dtype, out=grad_weight_N[span])
        grad_MD.mul_(weight_N1[span])
        torch.mm(grad_MD.t(), call.activated(before_MH, choice_M), out=down_EDH[e])
        torch.sum(grad_MD, 0, out=down_ED[e])
        grad_MH = torch.mm(grad_MD, call.down_EDH[e])
        if call.dropout_CH is not None:
            grad_MH.mul_(call.dropout_CH.index_select(0, choice_M))
        grad_MH = torch.ops.aten.gelu_backward(grad_MH, before_MH)
        torch.mm(grad_MH.t(), x_TD.index_select(0, token_M), out=up_EHD[e])
        torch.sum(grad_MH, 0, out=up_EH[e])
        torch.mm(grad_MH, call.up_EHD[e], out=grad_x_ND[span])

    for_each_expert(expert, _sizes(ends), x_TD.device)
    grad_x_ND[ends[-1] :].zero_()
    grad_weight_N[ends[-1] :].zero_()
    grad_weight_TK = call.unsorted(grad_weight_N).view_as(call.weight_TK)
    return call.sum_choices(call.unsorted(grad_x_ND)), grad_weight_TK, up_EHD, up_EH, down_EDH, down_ED


def _ends(call: Call) -> list[int]:
    """End of each expert's rows, known to the host. Waits for the device, save for an empty group."""
    ends: list[int] = call.offsets_E.tolist() if call.choice_N.shape[0] else [0] * call.offsets_E.shape[0]
    return ends


def _span(ends: Sequence[int], e: int) -> slice:
    """The rows of an expert."""
    return slice(ends[e - 1] if e else 0, ends[e])


def _sizes(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise([0, *ends])]
