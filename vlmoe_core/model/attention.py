"""Self-attention over all tokens of a sequence, with weights shared by the modalities or with weights of each.

Axis letters: T tokens, D width, S sequences, L places of a sequence, H heads, X kinds of sequences.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.layout import Layout, by_modality
from vlmoe_core.model.relative import Relative, RelativeBias

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(S, H, L, d) queries, keys, values, and a mask or bias -> (S, H, L, d)."""


class Projections(nn.Module):
    """The linear maps of attention: tokens to queries, keys and values, and back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias == "all")
        if config.qkv_bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(config.dim))
            self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.separate_biases = config.qkv_bias == "qv"
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.sub_norm else None
        self.out = nn.Linear(config.dim, config.dim)

    def project(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, 3D): queries, keys, values."""
        return F.linear(x_TD, self.qkv.weight, self._bias())

    def combine(self, y_TD: Tensor) -> Tensor:
        """The heads' outputs side by side (T, D) -> (T, D)."""
        out: Tensor = self.out(y_TD if self.norm is None else self.norm(y_TD))
        return out

    def _bias(self) -> Tensor | None:
        if not self.separate_biases:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class Attention(Projections):
    """Multi-head self-attention within each sequence, one set of weights for all tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.heads = config.heads
        self.kernel: Kernel = scaled_dot_product
        self.relative = _relative_bias(config)

    def forward(self, x_TD: Tensor, layout: Layout, relative: Relative | None = None) -> Tensor:
        """(T, D) -> (T, D)."""
        bias = _bias_of(self.relative, relative)
        return self.combine(attend(self.project(x_TD), layout, self.heads, bias, self.kernel))


class ModalityAttention(nn.Module):
    """The same, with weights of each modality: all tokens still attend to each other (BEiT-3, arXiv 2208.10442)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.kernel: Kernel = scaled_dot_product
        for name in config.modalities:
            self.add_module(name, Projections(config))
        self.relative = _relative_bias(config)

    def forward(self, x_TD: Tensor, layout: Layout, relative: Relative | None = None) -> Tensor:
        """(T, D) -> (T, D)."""
        bias = _bias_of(self.relative, relative)
        own = {name: part for name, part in self.named_children() if isinstance(part, Projections)}
        qkv_T3D = by_modality(x_TD, layout, {name: part.project for name, part in own.items()})
        y_TD = attend(qkv_T3D, layout, self.heads, bias, self.kernel)
        return by_modality(y_TD, layout, {name: part.combine for name, part in own.items()})


def build_attention(config: ModelConfig) -> Attention | ModalityAttention:
    """The attention of a block."""
    return Attention(config) if config.attention == "shared" else ModalityAttention(config)


def attend(qkv_T3D: Tensor, layout: Layout, heads: int, bias_XHLL: Tensor | None, kernel: Kernel) -> Tensor:
    """Attention within each sequence: (T, 3D) -> (T, D), the heads side by side.

    Args:
        qkv_T3D: queries, keys and values of all tokens.
        layout: where the tokens stand.
        heads: H, how many parts D has.
        bias_XHLL: added to the logits of each query (first) and key; X is 1 or S.
        kernel: attention of queries, keys and values by sequence and head.
    """
    qkv = layout.to_sequences(qkv_T3D).unflatten(2, (3, heads, -1))  # type: ignore[no-untyped-call]
    qkv = qkv.permute(2, 0, 3, 1, 4)
    y_SHLd = kernel(qkv[0], qkv[1], qkv[2], _mask(layout, bias_XHLL))
    if bias_XHLL is not None and layout.num_sequences == 0:
        # The kernel hands no gradient to the bias of nothing; an empty batch still touches all parameters.
        y_SHLd = y_SHLd + bias_XHLL.sum()
    return layout.to_tokens(y_SHLd.transpose(1, 2).flatten(2))


def _mask(layout: Layout, bias_XHLL: Tensor | None) -> Tensor | None:
    """The bias, and no attention to places where no token stands."""
    if layout.full:
        return bias_XHLL
    occupied = layout.occupied_SL[:, None, None, :]
    return occupied if bias_XHLL is None else bias_XHLL.masked_fill(~occupied, float("-inf"))


def _relative_bias(config: ModelConfig) -> RelativeBias | None:
    return RelativeBias(config) if config.positions == "relative" else None


def _bias_of(own: RelativeBias | None, relative: Relative | None) -> Tensor | None:
    """The block's own bias, or the one of all blocks."""
    if relative is None:
        return None
    return relative.bias_XHLL if own is None else own(relative)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (S, H, L, d) queries, keys and values; in float32 on a CPU.

    In bfloat16 the backward pass of the CPU kernel is slower than in float32 (docs/PERFORMANCE.md).
    """
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_as(q.dtype, mask))
    with torch.autocast("cpu", enabled=False):
        mask = _as(torch.float32, mask)
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return y.to(q.dtype)


def _as(dtype: torch.dtype, mask: Tensor | None) -> Tensor | None:
    """A mask that is a bias, in the dtype of the arithmetic."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
