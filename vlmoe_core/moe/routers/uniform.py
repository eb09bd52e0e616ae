"""Baseline: the experts take turns, perfectly balanced. For timing, and as the floor of ablations."""

from typing import Literal

import torch
from torch import Tensor

from vlmoe_core.moe.config import BaselineConfig, MoEConfig
from vlmoe_core.moe.routing import TopKRouter, assigned


class Config(BaselineConfig):
    """Experts in turn."""

    name: Literal["uniform"] = "uniform"
    """The router's name."""


class Router(TopKRouter):
    """Choice n of the group, counted token by token, goes to expert n mod E."""

    def __init__(self, dim: int, config: MoEConfig, init_std: float) -> None:
        super().__init__(config)

    def logits(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, D) -> (T, E)."""
        top_k, experts = self.config.top_k, self.config.num_experts
        choice_TK = torch.arange(x_TD.shape[0] * top_k, device=x_TD.device).view(-1, top_k)
        return assigned(choice_TK % experts, experts, x_TD.dtype)
