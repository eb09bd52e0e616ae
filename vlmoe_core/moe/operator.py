"""All experts of a layer as one operator, `vlmoe::expert_ffn`, and the gradient of it.

One operator, because torch's own grouped matmul has no float32 meta kernel, counts no FLOPs, refuses float64 and
expanded gradients, and leaves the rows of no group uninitialised; it serves as a kernel where it can. The hidden
activation is not kept but computed again in the backward pass.

Shapes: vlmoe_core/moe/call.py.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlmoe_core.moe import by_expert, native
from vlmoe_core.moe.call import Call
from vlmoe_core.moe.precision import without_autocast

logger = logging.getLogger(__name__)


@torch.library.custom_op("vlmoe::expert_ffn", mutates_args=())
def expert_ffn(
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
    """The weighted sum over each token's kept choices of down(gelu(up(x))).

    Args:
        x_TD, weight_TK, choice_N, offsets_E, up_EHD, down_EDH, dropout_CH: see `Call`.
        up_EH: biases of the first map; down_ED: of the second.
        save: whether a backward pass may follow.

    Returns:
        y_TD; and for the backward pass the hidden states before GELU (N, H) and the experts' outputs (N, D), both
        without rows if `save` is false.
    """
    call = Call(x_TD, weight_TK, choice_N, offsets_E, up_EHD, down_EDH, dropout_CH)
    _check(call, up_EH, down_ED)
    served = native.serves(call)
    if not served and not x_TD.is_cpu and x_TD.numel():
        _say_fallback(x_TD.device.type, x_TD.dtype, *up_EHD.shape[1:])
    kernel = native.forward if served else by_expert.forward
    with without_autocast(x_TD.device.type):
        return kernel(call, up_EH, down_ED, save)


@torch.library.custom_op("vlmoe::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    x_TD: Tensor,
    weight_TK: Tensor,
    choice_N: Tensor,
    offsets_E: Tensor,
    up_EHD: Tensor,
    down_EDH: Tensor,
    dropout_CH: Tensor | None,
    grad_TD: Tensor,
    before_NH: Tensor,
    out_ND: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x_TD, weight_TK, up_EHD, up_EH, down_EDH and down_ED, from that of y_TD."""
    call = Call(x_TD, weight_TK, choice_N, offsets_E, up_EHD, down_EDH, dropout_CH)
    kernel = native.backward if native.serves(call) else by_expert.backward
    with without_autocast(x_TD.device.type):
        return kernel(call, grad_TD, before_NH, out_ND)  # type: ignore[return-value]


def _check(call: Call, up_EH: Tensor, down_ED: Tensor) -> None:
    tensors = (call.x_TD, call.up_EHD, up_EH, call.down_EDH, down_ED)
    if len({t.dtype for t in tensors}) > 1:
        raise TypeError(f"expert_ffn needs one dtype, got {', '.join(str(t.dtype) for t in tensors)}")
    if call.up_EHD.shape[2] != call.x_TD.shape[1] or call.down_EDH.shape != call.up_EHD.transpose(1, 2).shape:
        raise ValueError(
            f"expert_ffn can't apply experts {tuple(call.up_EHD.shape)} and {tuple(call.down_EDH.shape)} to tokens "
            f"{tuple(call.x_TD.shape)}"
        )


@functools.cache
def _say_fallback(device_type: str, dtype: torch.dtype, hidden: int, dim: int) -> None:
    logger.warning(
        "torch's grouped matmul does not serve %s, widths %d and %d, on this %s device: one product an expert instead",
        dtype,
        dim,
        hidden,
        device_type,
    )


@expert_ffn.register_fake
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, weight_TK, choice_N, offsets_E, up_EHD, up_EH, down_EDH, down_ED, dropout_CH, save = arguments
    _check(Call(x_TD, weight_TK, choice_N, offsets_E, up_EHD, down_EDH, dropout_CH), up_EH, down_ED)
    rows = choice_N.shape[0] if save else 0
    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty(rows, up_EHD.shape[1]),
        x_TD.new_empty(rows, x_TD.shape[1]),
    )


@expert_ffn_backward.register_fake
def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_TD, weight_TK, _, _, up_EHD, down_EDH, *_ = arguments
    return (
        x_TD.new_empty(x_TD.shape),
        weight_TK.new_empty(weight_TK.shape),
        up_EHD.new_empty(up_EHD.shape),
        up_EHD.new_empty(up_EHD.shape[:2]),
        down_EDH.new_empty(down_EDH.shape),
        down_EDH.new_empty(down_EDH.shape[:2]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TD, weight_TK, choice_N, offsets_E, up_EHD, _, down_EDH, _, dropout_CH, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weight_TK, choice_N, offsets_E, up_EHD, down_EDH, dropout_CH, *output[1:])


def _backward(ctx: Any, grad_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 10
    *inputs, before_NH, out_ND = ctx.saved_tensors
    x, weight, up, up_bias, down, down_bias = expert_ffn_backward(*inputs, grad_TD, before_NH, out_ND)
    return x, weight, None, None, up, up_bias, down, down_bias, None, None


expert_ffn.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.vlmoe.expert_ffn)
def _flops(
    x_shape: Any, weight_shape: Any, choice_shape: Any, offsets_shape: Any, up_shape: Any, *_: Any, **__: Any
) -> int:
    """Two a multiply-add, over all N rows, dropped ones included: which they are is not known from shapes."""
    return int(4 * choice_shape[0] * up_shape[1] * up_shape[2])


@register_flop_formula(torch.ops.vlmoe.expert_ffn_backward)
def _flops_backward(x_shape: Any, weight_shape: Any, choice_shape: Any, *shapes: Any, **__: Any) -> int:
    """Twice the forward pass: the gradients of the rows and of the weights."""
    return 2 * _flops(x_shape, weight_shape, choice_shape, *shapes)
