"""Noisy softmax over all experts, then top-k (V-MoE, arXiv 2106.05974, section 2.1).

Shapes: T tokens, D width, E experts.
"""

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.config import exact
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.plan import RoutingPlan, capacity_of, make_plan
from vlmoe_core.moe.precision import without_autocast


class Router(nn.Module):
    """A linear map to one logit an expert, without bias, in float32 (float64 for float64 tokens) even under autocast.

    Noise N(0, (noise / E)^2) is added to the logits in training only. It comes from torch's default generator, whose
    state activation checkpointing restores, so that the recompute makes the same plan.
    """

    def __init__(self, dim: int, config: MoEConfig, init_std: float) -> None:
        super().__init__()
        self.config = config
        # Read once: a compiler can't trace the reading of a decimal.
        self.train_factor = _exact_or_none(config.capacity_factor)
        self.eval_factor = _exact_or_none(config.eval_capacity_factor)
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        nn.init.trunc_normal_(self.weight, std=init_std)

    def forward(self, x_TD: Tensor) -> RoutingPlan:
        """Route the tokens of one group: x_TD (T, D) -> the plan for them, with the capacity of the present mode."""
        config = self.config
        noise_std = config.noise / config.num_experts if self.training else 0.0
        factor = self.train_factor if self.training else self.eval_factor
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        with without_autocast(x_TD.device.type):
            clean_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
            noisy_TE = clean_TE + noise_std * torch.randn_like(clean_TE) if noise_std else clean_TE
            return make_plan(
                clean_TE,
                noisy_TE,
                top_k=config.top_k,
                weights=config.weights,
                priority=config.priority,
                capacity=capacity_of(x_TD.shape[0], config.num_experts, config.top_k, factor),
                noise_std=noise_std,
            )


def _exact_or_none(factor: float | None) -> Fraction | None:
    return None if factor is None else exact(factor)
