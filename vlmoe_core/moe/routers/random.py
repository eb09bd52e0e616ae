"""Baseline: every token goes to experts drawn anew each time (THOR, arXiv 2110.04260)."""

from typing import Literal

import torch
from torch import Tensor

from vlmoe_core.moe.config import BaselineConfig
from vlmoe_core.moe.routing import BaselineRouter


class Config(BaselineConfig):
    """Experts by chance."""

    name: Literal["random"] = "random"
    """The router's name."""


class Router(BaselineRouter):
    """K different experts a token, drawn from torch's default generator, in evaluation as well."""

    def assign(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, D) -> (T, K)."""
        draws_TE = torch.rand(x_TD.shape[0], self.config.num_experts, device=x_TD.device)
        return draws_TE.topk(self.config.top_k, dim=1).indices
