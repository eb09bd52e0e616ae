"""Baseline: every token goes to experts drawn anew each time (THOR, arXiv 2110.04260)."""

from typing import Literal

import torch
from torch import Tensor

from vlmoe_core.moe.config import BaselineConfig, MoEConfig
from vlmoe_core.moe.routing import TopKRouter, assigned


class Config(BaselineConfig):
    """Experts by chance."""

    name: Literal["random"] = "random"
    """The router's name."""


class Router(TopKRouter):
    """K different experts a token, drawn from torch's default generator, in evaluation as well."""

    def __init__(self, dim: int, config: MoEConfig, init_std: float) -> None:
        super().__init__(config)

    def logits(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, D) -> (T, E)."""
        draws_TE = torch.rand(x_TD.shape[0], self.config.num_experts, device=x_TD.device)
        return assigned(draws_TE.topk(self.config.top_k, dim=1).indices, self.config.num_experts, x_TD.dtype)
