"""One pre-LN block: attention, then the feed-forward network of each token's modality.

Axis letters: T tokens, D width, S sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlmoe_core.model.attention import build_attention
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.layout import Layout
from vlmoe_core.model.norms import build_norm, normed
from vlmoe_core.model.relative import Relative
from vlmoe_core.moe.dense import DenseFFN
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.plan import RoutingPlan


class Routed(NamedTuple):
    """The plan of one sparse layer."""

    layer: int
    """0-based block."""
    pool: str
    """vision, text or shared."""
    plan: RoutingPlan
    """Which expert each token went to."""
    num_image_tokens: int
    """The first so many tokens of the plan are image tokens, the others text tokens."""


def build_ffn(config: ModelConfig, layer: int, name: str) -> SparseFFN | DenseFFN:
    """The feed-forward network of that name in a 0-based block."""
    moe = config.sparse(name, layer)
    sub_norm_eps = config.norm_eps if config.sub_norm else None
    if moe is not None:
        return SparseFFN(config.dim, config.hidden, moe, config.init_std, sub_norm_eps, moe.kept(layer))
    return DenseFFN(config.dim, config.hidden, sub_norm_eps)


class Block(nn.Module):
    """Attention and modality feed-forward networks with residual connections (VL-MoE, section 3; VLMo, 2111.02358)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.drop_path = config.drop_path * layer / max(1, config.layers - 1)
        self.norm1 = build_norm(config)
        self.attention = build_attention(config)
        self.norm2 = _ffn_norms(config, layer)
        self.ffn = nn.ModuleDict({name: build_ffn(config, layer, name) for name in config.ffns(layer)})
        self.scale1 = _layer_scale(config)
        self.scale2 = _layer_scale(config)

    def forward(
        self, x_TD: Tensor, layout: Layout, relative: Relative | None = None
    ) -> tuple[Tensor, tuple[Routed, ...]]:
        """(T, D) -> (T, D) and the plans of the sparse layers that ran."""
        update_TD = self.attention(normed(self.norm1, x_TD, layout), layout, relative)
        x_TD = self._add(x_TD, update_TD, self.scale1, layout)
        y_TD, routed = self._feed_forward(x_TD, layout)
        return self._add(x_TD, y_TD, self.scale2, layout), routed

    def _feed_forward(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, tuple[Routed, ...]]:
        images, tokens = layout.num_image_tokens, x_TD.shape[0]
        for name in ("vl", "shared"):
            if name in self.ffn and (layout.fused or name == "shared"):
                return self._through(name, x_TD, layout, 0, tokens)
        if len(layout.modalities) == 1:
            # The other modality's experts would get a gradient of zeros at full size (docs/PERFORMANCE.md).
            return self._through(layout.modalities[0], x_TD, layout, 0, tokens)
        image, image_routed = self._through("vision", x_TD, layout, 0, images)
        text, text_routed = self._through("text", x_TD, layout, images, tokens)
        return torch.cat([image, text]), image_routed + text_routed

    def _through(
        self, name: str, x_TD: Tensor, layout: Layout, start: int, stop: int
    ) -> tuple[Tensor, tuple[Routed, ...]]:
        """One feed-forward network over the tokens from `start` to `stop`."""
        norm = self.norm2[name] if isinstance(self.norm2, nn.ModuleDict) else self.norm2
        ffn, x_TD = self.ffn[name], norm(x_TD[start:stop])
        if not isinstance(ffn, SparseFFN):
            return ffn(x_TD), ()
        y_TD, plan = ffn(x_TD, layout.identity_T[start:stop])
        num_image_tokens = min(stop, layout.num_image_tokens) - start if start < layout.num_image_tokens else 0
        return y_TD, (Routed(self.layer, name, plan, num_image_tokens),)

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
        return nn.LayerNorm(config.dim, eps=config.norm_eps)
    return nn.ModuleDict({name: nn.LayerNorm(config.dim, eps=config.norm_eps) for name in config.ffns(layer)})


def _layer_scale(config: ModelConfig) -> nn.Parameter | None:
    if config.layer_scale is None:
        return None
    return nn.Parameter(torch.full((config.dim,), config.layer_scale))
