"""Self-attention, shared by all modalities.

Axis letters: T tokens, D width, S sequences, L places of a sequence, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.layout import Layout


class Attention(nn.Module):
    """Multi-head self-attention within each sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias == "all")
        if config.qkv_bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(config.dim))
            self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.separate_biases = config.qkv_bias == "qv"
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """(T, D) -> (T, D)."""
        qkv_T3D = F.linear(x_TD, self.qkv.weight, self._bias())
        qkv = layout.to_sequences(qkv_T3D).unflatten(2, (3, self.heads, -1))  # type: ignore[no-untyped-call]
        qkv = qkv.permute(2, 0, 3, 1, 4)
        mask = None if layout.full else layout.occupied_SL[:, None, None, :]
        y_SHLd = scaled_dot_product(qkv[0], qkv[1], qkv[2], mask)
        y_TD = layout.to_tokens(y_SHLd.transpose(1, 2).flatten(2))
        out: Tensor = self.out(y_TD)
        return out

    def _bias(self) -> Tensor | None:
        if not self.separate_biases:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (S, H, L, d) queries, keys and values; in float32 on a CPU.

    In bfloat16 the backward pass of the CPU kernel is slower than in float32 (docs/PERFORMANCE.md).
    """
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return y.to(q.dtype)
