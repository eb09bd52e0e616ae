"""One pre-LN block: shared attention, then the feed-forward network of each token's modality.

Axis letters: T tokens, D width, S sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.model.attention import Attention
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.layout import Layout
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.plan import RoutingPlan

EPS = 1e-6


class Routed(NamedTuple):
    """The plan of one sparse layer."""

    layer: int
    """0-based block."""
    modality: str
    """vision or text."""
    plan: RoutingPlan
    """Which expert each token went to."""


class DenseFFN(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        out: Tensor = self.down(F.gelu(self.up(x_TD)))
        return out


def build_ffn(config: ModelConfig, layer: int, modality: str) -> SparseFFN | DenseFFN:
    """The network of a modality in a 0-based block."""
    moe = config.sparse(modality, layer)
    if moe is not None:
        return SparseFFN(config.dim, config.hidden, moe, config.init_std)
    return DenseFFN(config.dim, config.hidden)


class Block(nn.Module):
    """Attention and modality feed-forward networks with residual connections (VL-MoE, section 3; VLMo, 2111.02358)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.drop_path = config.drop_path * layer / max(1, config.layers - 1)
        self.norm1 = nn.LayerNorm(config.dim, eps=EPS)
        self.attention = Attention(config)
        self.norm2 = _ffn_norms(config, layer)
        self.ffn = nn.ModuleDict({m: build_ffn(config, layer, m) for m in config.modalities(layer)})
        self.scale1 = _layer_scale(config)
        self.scale2 = _layer_scale(config)

    def forward(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, tuple[Routed, ...]]:
        """(T, D) -> (T, D) and the plans of the sparse layers, in the order vision, text."""
        x_TD = self._add(x_TD, self.attention(self.norm1(x_TD), layout), self.scale1, layout)
        y_TD, routed = self._feed_forward(x_TD, layout)
        return self._add(x_TD, y_TD, self.scale2, layout), routed

    def _feed_forward(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, tuple[Routed, ...]]:
        if layout.fused and "vl" in self.ffn:
            return self._modality("vl", x_TD)
        if len(layout.modalities) == 1:
            # The other modality's experts would get a gradient of zeros at full size (docs/PERFORMANCE.md).
            return self._modality(layout.modalities[0], x_TD)
        image, image_routed = self._modality("vision", x_TD[: layout.num_image_tokens])
        text, text_routed = self._modality("text", x_TD[layout.num_image_tokens :])
        return torch.cat([image, text]), image_routed + text_routed

    def _modality(self, modality: str, x_TD: Tensor) -> tuple[Tensor, tuple[Routed, ...]]:
        norm = self.norm2[modality] if isinstance(self.norm2, nn.ModuleDict) else self.norm2
        ffn = self.ffn[modality]
        if isinstance(ffn, SparseFFN):
            y_TD, plan = ffn(norm(x_TD))
            return y_TD, (Routed(self.layer, modality, plan),)
        return ffn(norm(x_TD)), ()

    def _add(self, x_TD: Tensor, branch_TD: Tensor, scale_D: Tensor | None, layout: Layout) -> Tensor:
        if scale_D is not None:
            branch_TD = branch_TD * scale_D
        if self.training and self.drop_path > 0:
            branch_TD = branch_TD * self._survivors(layout, branch_TD).index_select(0, layout.sequence_T)
        return x_TD + branch_TD

    def _survivors(self, layout: Layout, like: Tensor) -> Tensor:
        """(S, 1), 0 for the sequences that skip the branch, else 1 / probability to stay (arXiv 1603.09382)."""
        stay = 1 - self.drop_path
        draws_S1 = torch.rand(layout.num_sequences, 1, device=like.device)
        return (draws_S1 < stay).to(like.dtype) / stay


def _ffn_norms(config: ModelConfig, layer: int) -> nn.Module:
    """The norm before the feed-forward networks: one for all, or one for each (VLMo)."""
    if config.norm == "shared":
        return nn.LayerNorm(config.dim, eps=EPS)
    return nn.ModuleDict({m: nn.LayerNorm(config.dim, eps=EPS) for m in config.modalities(layer)})


def _layer_scale(config: ModelConfig) -> nn.Parameter | None:
    if config.layer_scale is None:
        return None
    return nn.Parameter(torch.full((config.dim,), config.layer_scale))
