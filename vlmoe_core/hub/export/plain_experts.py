"""The experts of a layer in torch's own operators, for graphs that run where `vlmoe::expert_ffn` is not known.

One slice of the rows sorted by expert for each expert, so that the work is exactly the routed work.

Shapes: vlmoe_core/moe/call.py; M rows of one expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_expert_ffn(
    x_TD: Tensor,
    weight_TK: Tensor,
    choice_N: Tensor,
    offsets_E: Tensor,
    up_EHD: Tensor,
    up_EH: Tensor,
    down_EDH: Tensor,
    down_ED: Tensor,
    dropout_CH: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `vlmoe::expert_ffn` gives in evaluation: y_TD, and two tensors without rows."""
    assert dropout_CH is None and not save, "a graph is exported in evaluation mode, without gradients"
    top_k = weight_TK.shape[1]
    x_ND = x_TD.index_select(0, choice_N // top_k)
    experts = zip(up_EHD.unbind(), up_EH.unbind(), down_EDH.unbind(), down_ED.unbind(), strict=True)
    outputs = [
        F.linear(F.gelu(F.linear(rows_MD, up_HD, up_H)), down_DH, down_D)
        for rows_MD, (up_HD, up_H, down_DH, down_D) in zip(_slices(x_ND, offsets_E), experts, strict=True)
    ]
    # Dropped choices, which stand behind the last expert's rows, read a row of zeros.
    rows_RD = torch.cat([*outputs, x_TD.new_zeros(1, x_TD.shape[1])])
    place_C = torch.minimum(choice_N.argsort(), offsets_E[-1])
    weighted_CD = rows_RD.index_select(0, place_C) * weight_TK.reshape(-1, 1).to(x_TD.dtype)
    y_TD = weighted_CD.view(*weight_TK.shape, x_TD.shape[1]).sum(1)
    return y_TD, x_TD.new_empty(0, up_EH.shape[1]), x_TD.new_empty(0, x_TD.shape[1])


def _slices(x_ND: Tensor, offsets_E: Tensor) -> Iterator[Tensor]:
    """The rows of each expert."""
    start = 0
    for last in offsets_E.unbind():
        end: int = last.item()  # type: ignore[assignment]
        size = end - start
        torch._check(size >= 0)  # type: ignore[no-untyped-call]
        torch._check(start + size <= x_ND.shape[0])  # type: ignore[no-untyped-call]
        yield x_ND.narrow(0, start, size)
        start = end
