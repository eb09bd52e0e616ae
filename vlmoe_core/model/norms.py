"""LayerNorms of the token states: one for all tokens, or one for each modality.

Axis letters: T tokens, D width.
"""

from torch import Tensor, nn

from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.layout import Layout, by_modality


def build_norm(config: ModelConfig) -> nn.LayerNorm | nn.ModuleDict:
    """The norm before attention, and the final one: of each modality where attention is too (BEiT-3)."""
    if config.norm == "per_modality" and config.attention == "per_modality":
        return nn.ModuleDict({name: nn.LayerNorm(config.dim, eps=config.norm_eps) for name in config.modalities})
    return nn.LayerNorm(config.dim, eps=config.norm_eps)


def normed(norm: nn.Module, x_TD: Tensor, layout: Layout) -> Tensor:
    """(T, D) -> (T, D), each token by the norm of its modality."""
    if isinstance(norm, nn.ModuleDict):
        return by_modality(x_TD, layout, dict(norm.items()))
    y_TD: Tensor = norm(x_TD)
    return y_TD
