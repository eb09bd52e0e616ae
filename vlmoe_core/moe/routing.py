"""What all routers share: from logits to a plan.

Shapes: T tokens of one routing group, D width, E experts.
"""

from fractions import Fraction

import torch
from torch import Tensor, nn

from vlmoe_core.decimals import exact
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.plan import RoutingPlan, capacity_of, make_plan
from vlmoe_core.moe.precision import without_autocast


class TopKRouter(nn.Module):
    """Softmax over all experts, then top-k (V-MoE, arXiv 2106.05974, section 2.1); subclasses give the logits.

    All of it in float32 (float64 for float64 tokens), even under autocast. Noise N(0, (noise / E)^2) is added to the
    logits in training only. It comes from torch's default generator, whose state activation checkpointing restores, so
    that the recompute makes the same plan.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        # Read once: a compiler can't trace the reading of a decimal.
        self.train_factor = _exact_or_none(config.capacity_factor)
        self.eval_factor = _exact_or_none(config.eval_capacity_factor)

    def logits(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, E) logits without noise, in the dtype of x_TD."""
        raise NotImplementedError

    def choice_bias(self) -> Tensor | None:
        """(E,) what the choice alone adds to the gates, not their weights."""
        return None

    def forward(
        self, x_TD: Tensor, identity_T: Tensor | None = None, kept: tuple[int, ...] | None = None
    ) -> RoutingPlan:
        """Route the tokens of one group, with the capacity of the present mode.

        Args:
            x_TD: (T, D).
            identity_T: (T,) what each token is, whatever its state: the id of a word, the place of a patch. Only the
                hash router asks for it.
            kept: the experts that are there; null: all.
        """
        config = self.config
        noise_std = config.noise / config.num_experts if self.training and config.router.learns else 0.0
        factor = self.train_factor if self.training else self.eval_factor
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        with without_autocast(x_TD.device.type):
            clean_TE = self.logits(x_TD.to(dtype), identity_T)
            noisy_TE = clean_TE + noise_std * torch.randn_like(clean_TE) if noise_std else clean_TE
            return make_plan(
                clean_TE,
                noisy_TE,
                top_k=config.top_k,
                weights=config.weights,
                priority=config.priority,
                capacity=capacity_of(x_TD.shape[0], config.num_experts, config.top_k, factor),
                noise_std=noise_std,
                choice_bias_E=self.choice_bias(),
                kept=kept,
                removed=config.removed,
            )


class BaselineRouter(TopKRouter):
    """A router that learns nothing: subclasses name the experts, which get the gate 1/K each, all others 0."""

    def __init__(self, dim: int, config: MoEConfig, init_std: float) -> None:
        super().__init__(config)

    def assign(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, K) different experts for each token."""
        raise NotImplementedError

    def logits(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, E): 0 for the assigned experts, minus infinity for all others."""
        closed_TE = x_TD.new_full((x_TD.shape[0], self.config.num_experts), -torch.inf)
        return closed_TE.scatter(1, self.assign(x_TD, identity_T), 0.0)


def _exact_or_none(factor: float | None) -> Fraction | None:
    return None if factor is None else exact(factor)
