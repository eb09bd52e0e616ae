"""Cosine router: tokens and experts meet in a small space, where only their angle counts (X-MoE, arXiv 2204.09179).

Shapes: T tokens, D width, E experts, P width of the small space.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.moe.config import MoEConfig, RouterConfig
from vlmoe_core.moe.routing import TopKRouter


class Config(RouterConfig):
    """Cosine of the angle between token and expert (X-MoE, section 3.2)."""

    name: Literal["cosine"] = "cosine"
    """The router's name."""
    dim: int = Field(16, ge=1)
    """P, width of the space in which angles are taken."""
    temperature: float = Field(0.07, ge=0.01)
    """Initial divisor of the cosines; learned, never below 0.01."""

    def num_params(self, dim: int, num_experts: int) -> int:
        """Projection, experts' vectors, temperature."""
        return self.dim * (dim + num_experts) + 1

    def flops(self, dim: int, num_experts: int) -> int:
        """Of the two products."""
        return 2 * self.dim * (dim + num_experts)


class Router(TopKRouter):
    """Cosine between the projected token and each expert's vector, over a learned temperature."""

    def __init__(self, dim: int, config: MoEConfig, init_std: float) -> None:
        super().__init__(config)
        own = config.router
        assert isinstance(own, Config)
        self.projection = nn.Parameter(torch.empty(own.dim, dim))
        self.weight = nn.Parameter(torch.empty(config.num_experts, own.dim))
        self.temperature = nn.Parameter(torch.tensor(own.temperature))
        # Lengths don't matter, directions do: normal rows point everywhere alike.
        nn.init.trunc_normal_(self.projection, std=init_std)
        nn.init.trunc_normal_(self.weight, std=init_std)

    def logits(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, D) -> (T, E)."""
        token_TP = F.normalize(F.linear(x_TD, self.projection.to(x_TD.dtype)), dim=1)
        expert_EP = F.normalize(self.weight.to(x_TD.dtype), dim=1)
        return F.linear(token_TP, expert_EP) / self.temperature.to(x_TD.dtype).clamp_min(0.01)
