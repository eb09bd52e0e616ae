"""The grouped matrix product: one custom operator, `vlmoe::grouped_mm`, that computes all experts of a layer.

Rows are sorted by group. `offsets_E[e]` is the end of group e, so that its rows are offsets_E[e-1] .. offsets_E[e]-1;
rows from offsets_E[-1] on belong to no group.

Shapes: N rows, E groups, J and M widths.

torch's own torch.nn.functional.grouped_mm has no float32 meta kernel, counts no FLOPs, refuses float64 and expanded
gradients, and leaves the rows of no group uninitialised. It serves here as a kernel where it can.
"""

import functools
import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

logger = logging.getLogger(__name__)

LOW_PRECISION = (torch.bfloat16, torch.float16)

ROW_MULTIPLE = 32
"""Group sizes are rounded up to this in low precision on a CPU: oneDNN compiles a kernel for every new shape."""

ALIGNMENT = 16
"""Bytes that the row strides of torch's grouped kernel must be a multiple of."""


@torch.library.custom_op("vlmoe::grouped_mm", mutates_args=())
def grouped_mm(a: Tensor, b: Tensor, offsets_E: Tensor, bias_EM: Tensor | None) -> Tensor:
    """Multiply group by group, in one of two forms; each one's gradient is made of the two.

    Rows: a (N, J), b (E, J, M) -> (N, M), row n of group e is a[n] @ b[e] + bias_EM[e]; rows of no group are 0.
    Blocks: a (J, N), b (N, M) -> (E, J, M), block e is a[:, rows of e] @ b[rows of e]; it takes no bias.

    `a`, `b` and `bias_EM` share a dtype; `offsets_E` is int32 or int64, does not fall, and ends at N at most.
    """
    _check(a, b, bias_EM)
    # Only out= forms below: autocast, where it is on, changes the dtype of all others.
    if _native_serves(a, b):
        return _native_rows(a, b, offsets_E, bias_EM) if b.dim() == 3 else _native_blocks(a, b, offsets_E)
    if a.device.type != "cpu" and a.numel():
        _say_fallback(a.device.type, a.dtype)
    return _loop_rows(a, b, offsets_E, bias_EM) if b.dim() == 3 else _loop_blocks(a, b, offsets_E)


def _check(a: Tensor, b: Tensor, bias_EM: Tensor | None) -> None:
    dtypes = {t.dtype for t in (a, b, bias_EM) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"grouped_mm needs one dtype, got {sorted(map(str, dtypes))}; cast the operands first")
    if a.dim() != 2 or b.dim() not in (2, 3) or a.shape[1] != b.shape[-2]:
        raise ValueError(f"grouped_mm can't multiply shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if b.dim() == 2 and bias_EM is not None:
        raise ValueError("grouped_mm takes a bias with a 3-dimensional second operand only")


def _groups(offsets_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(number, first row, end) of each group. Waits for the device."""
    for e, (start, end) in enumerate(pairwise([0, *offsets_E.tolist()])):
        yield e, start, end


def _loop_rows(a: Tensor, b: Tensor, offsets_E: Tensor, bias_EM: Tensor | None) -> Tensor:
    out_NM = a.new_empty(a.shape[0], b.shape[2])
    done = 0
    for e, start, end in _groups(offsets_E):
        if end > start:
            _matmul_into(out_NM[start:end], _rounded(a[start:end]), b[e], None if bias_EM is None else bias_EM[e])
        done = end
    out_NM[done:].zero_()
    return out_NM


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """out = (a @ b + bias), the rows of `a` beyond those of `out` left out."""
    whole = out if a.shape[0] == out.shape[0] else out.new_empty(a.shape[0], out.shape[1])
    if bias is None:
        torch.mm(a, b, out=whole)
    else:
        torch.addmm(bias, a, b, out=whole)
    if whole is not out:
        out.copy_(whole[: out.shape[0]])


def _loop_blocks(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    out_EJM = a.new_empty(offsets_E.shape[0], a.shape[0], b.shape[1])
    rows_NJ = a.t()
    for e, start, end in _groups(offsets_E):
        if end > start:
            torch.mm(_rounded(rows_NJ[start:end]).t(), _rounded(b[start:end]), out=out_EJM[e])
        else:
            out_EJM[e].zero_()
    return out_EJM


def _rounded(rows: Tensor) -> Tensor:
    """The rows, followed by zero rows up to a multiple of ROW_MULTIPLE in low precision on a CPU."""
    missing = -rows.shape[0] % ROW_MULTIPLE
    if missing == 0 or rows.device.type != "cpu" or rows.dtype not in LOW_PRECISION:
        return rows
    return F.pad(rows, (0, 0, 0, missing))


def _native_serves(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped kernel takes these operands: bfloat16 on CUDA, rows aligned."""
    return a.is_cuda and a.dtype == torch.bfloat16 and a.numel() > 0 and _aligned(a) and _aligned(b)


def _aligned(x: Tensor) -> bool:
    """Whether one of the last two strides is 1 and the other a multiple of ALIGNMENT bytes."""
    inner, outer = sorted(x.stride()[-2:])
    return inner == 1 and outer > 1 and outer * x.element_size() % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0


def _native_rows(a: Tensor, b: Tensor, offsets_E: Tensor, bias_EM: Tensor | None) -> Tensor:
    out_NM = F.grouped_mm(a, b, offs=offsets_E.int())
    group_N = torch.searchsorted(
        offsets_E, torch.arange(a.shape[0], device=a.device, dtype=offsets_E.dtype), right=True
    )
    if bias_EM is not None:
        out_NM += F.pad(bias_EM, (0, 0, 0, 1)).index_select(0, group_N)
    return out_NM.masked_fill_((group_N == offsets_E.shape[0]).unsqueeze(1), 0.0)


def _native_blocks(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=offsets_E.int())


@functools.cache
def _say_fallback(device_type: str, dtype: torch.dtype) -> None:
    logger.warning("torch's grouped matmul does not serve %s on %s: one matmul an expert instead", dtype, device_type)


@grouped_mm.register_fake
def _fake(a: Tensor, b: Tensor, offsets_E: Tensor, bias_EM: Tensor | None) -> Tensor:
    _check(a, b, bias_EM)
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offsets_E.shape[0], a.shape[0], b.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offsets_E, _ = inputs
    ctx.save_for_backward(a, b, offsets_E)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    a, b, offsets_E = ctx.saved_tensors
    need_a, need_b, _, need_bias = ctx.needs_input_grad
    if b.dim() == 2:
        grad_a = grouped_mm(b, grad.transpose(1, 2), offsets_E, None).t() if need_a else None
        return grad_a, grouped_mm(a.t(), grad, offsets_E, None) if need_b else None, None, None
    grad_a = grouped_mm(grad, b.transpose(1, 2), offsets_E, None) if need_a else None
    return (
        grad_a,
        _weight_gradient(a, b, grad, offsets_E) if need_b else None,
        None,
        group_sum(grad, offsets_E) if need_bias else None,
    )


def _weight_gradient(a_NJ: Tensor, b_EJM: Tensor, grad_NM: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient of b, in b's own memory layout, so that it becomes a parameter's gradient without a copy."""
    if b_EJM.stride(1) == 1:
        grad_EMJ: Tensor = grouped_mm(grad_NM.t(), a_NJ, offsets_E, None)
        return grad_EMJ.transpose(1, 2)
    grad_EJM: Tensor = grouped_mm(a_NJ.t(), grad_NM, offsets_E, None)
    return grad_EJM


def group_sum(rows_NM: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum of each group's rows, (N, M) -> (E, M), without atomics: a product with ones."""
    ones_NJ = rows_NM.new_ones(rows_NM.shape[0], _ones_width(rows_NM))
    sums_EJM: Tensor = grouped_mm(ones_NJ.t(), rows_NM, offsets_E, None)
    return sums_EJM[:, 0]


def _ones_width(rows_NM: Tensor) -> int:
    """1, or as many columns of ones as torch's grouped kernel needs for its alignment."""
    return ALIGNMENT // rows_NM.element_size() if rows_NM.device.type == "cuda" else 1


grouped_mm.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.vlmoe.grouped_mm)
def _flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Two a multiply-add over all N rows, those of no group included: which they are is not known from shapes."""
    return int(2 * a_shape[0] * a_shape[1] * b_shape[-1])
