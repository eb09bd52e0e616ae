"""Baseline: the experts take turns, perfectly balanced. For timing, and as the floor of ablations."""

from typing import Literal

import torch
from torch import Tensor

from vlmoe_core.moe.config import BaselineConfig
from vlmoe_core.moe.routing import BaselineRouter


class Config(BaselineConfig):
    """Experts in turn."""

    name: Literal["uniform"] = "uniform"
    """The router's name."""


class Router(BaselineRouter):
    """Choice n of the group, counted token by token, goes to expert n mod E."""

    def assign(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, D) -> (T, K)."""
        choice_TK = torch.arange(x_TD.shape[0] * self.config.top_k, device=x_TD.device).view(-1, self.config.top_k)
        return choice_TK % self.config.num_experts
