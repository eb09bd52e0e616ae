"""All experts at once, through torch's grouped kernel. No wait for the device.

Shapes: vlmoe_core/moe/call.py; J and M widths.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.moe.call import Call

ALIGNMENT = 16
"""Bytes that the rows of torch's grouped kernel must be a multiple of."""

CAPABILITIES = (9, 10)
"""Major compute capabilities (Hopper, Blackwell) for which torch has the kernel; elsewhere it loops and waits."""


def serves(call: Call) -> bool:
    """Whether torch's grouped kernel takes these operands: bfloat16, aligned rows, on a GPU that it is written for."""
    x_TD = call.x_TD
    widths = (x_TD.shape[1], call.up_EHD.shape[1])
    aligned = all(width * x_TD.element_size() % ALIGNMENT == 0 for width in widths)
    if not (x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and x_TD.numel() > 0 and aligned):
        return False
    return torch.cuda.get_device_capability(x_TD.device)[0] in CAPABILITIES


def forward(call: Call, up_EH: Tensor, down_ED: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' outputs (T, D); if `save`, hidden states before GELU (N, H) and unweighted outputs (N, D)."""
    x_ND = call.x_TD.index_select(0, call.choice_N // call.top_k)
    before_NH = _rows(x_ND, call.up_EHD.transpose(1, 2), call.offsets_E, up_EH)
    out_ND = _rows(call.activated(before_NH, call.choice_N), call.down_EDH.transpose(1, 2), call.offsets_E, down_ED)
    y_TD = call.sum_choices(call.unsorted(out_ND).mul_(call.weight_C1))
    if save:
        return y_TD, before_NH, out_ND
    return y_TD, before_NH.new_empty(0, before_NH.shape[1]), out_ND.new_empty(0, out_ND.shape[1])


def backward(call: Call, grad_TD: Tensor, before_NH: Tensor, out_ND: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x_TD, weight_TK, up_EHD, up_EH, down_EDH and down_ED."""
    token_N = call.choice_N // call.top_k
    grad_ND = grad_TD.index_select(0, token_N)
    dot_N = torch.sum(grad_ND * out_ND, 1, dtype=call.weight_TK.dtype)
    grad_ND.mul_(call.weight_C1.index_select(0, call.choice_N))
    down_EDH = _blocks(grad_ND.t(), call.activated(before_NH, call.choice_N), call.offsets_E)
    grad_NH = _rows(grad_ND, call.down_EDH, call.offsets_E, None)
    if call.dropout_CH is not None:
        grad_NH.mul_(call.dropout_CH.index_select(0, call.choice_N))
    grad_NH = torch.ops.aten.gelu_backward(grad_NH, before_NH)
    up_EHD = _blocks(grad_NH.t(), call.x_TD.index_select(0, token_N), call.offsets_E)
    grad_x_TD = call.sum_choices(call.unsorted(_rows(grad_NH, call.up_EHD, call.offsets_E, None)))
    grad_weight_TK = call.unsorted(dot_N).view_as(call.weight_TK)
    sums = _sums(grad_NH, call.offsets_E), _sums(grad_ND, call.offsets_E)
    return grad_x_TD, grad_weight_TK, up_EHD, sums[0], down_EDH, sums[1]


def _rows(a_NJ: Tensor, b_EJM: Tensor, offsets_E: Tensor, bias_EM: Tensor | None) -> Tensor:
    """Row n of group e is a[n] @ b[e] + bias[e]; the rows of no group, which the kernel leaves as they were, are 0."""
    out_NM = F.grouped_mm(a_NJ, b_EJM, offs=offsets_E)
    place_N = torch.arange(a_NJ.shape[0], device=a_NJ.device, dtype=offsets_E.dtype)
    group_N = torch.searchsorted(offsets_E, place_N, right=True)
    if bias_EM is not None:
        out_NM += F.pad(bias_EM, (0, 0, 0, 1)).index_select(0, group_N)
    return out_NM.masked_fill_((group_N == offsets_E.shape[0]).unsqueeze(1), 0.0)


def _blocks(a_JN: Tensor, b_NM: Tensor, offsets_E: Tensor) -> Tensor:
    """Block e is a[:, rows of e] @ b[rows of e]."""
    return F.grouped_mm(a_JN, b_NM, offs=offsets_E)


def _sums(rows_NM: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum of each group's rows without atomics: a product with ones, as many columns of them as alignment asks for."""
    ones_NJ = rows_NM.new_ones(rows_NM.shape[0], ALIGNMENT // rows_NM.element_size())
    return _blocks(ones_NJ.t(), rows_NM, offsets_E)[:, 0].contiguous()
