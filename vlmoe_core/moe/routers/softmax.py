"""Noisy softmax over all experts, then top-k (V-MoE, arXiv 2106.05974, section 2.1).

Shapes: T tokens, D width, E experts.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.moe.config import MoEConfig, RouterConfig
from vlmoe_core.moe.routing import TopKRouter


class Config(RouterConfig):
    """Noisy top-k (V-MoE)."""

    name: Literal["softmax"] = "softmax"
    """The router's name."""


class Router(TopKRouter):
    """A linear map to one logit an expert, without bias."""

    def __init__(self, dim: int, config: MoEConfig, init_std: float) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        nn.init.trunc_normal_(self.weight, std=init_std)

    def logits(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, D) -> (T, E)."""
        return F.linear(x_TD, self.weight.to(x_TD.dtype))
