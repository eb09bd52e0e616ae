"""Loss-free balancing: a bias steers the choice, no loss does (arXiv 2408.15664).

Shapes: T tokens, D width, E experts.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vlmoe_core.moe.config import MoEConfig, RouterConfig
from vlmoe_core.moe.routers.softmax import Router as SoftmaxRouter


class Config(RouterConfig):
    """Loss-free balancing (arXiv 2408.15664, section 2)."""

    default_vloss = 0.0

    name: Literal["bias-balanced"] = "bias-balanced"
    """The router's name."""
    update_rate: float = Field(0.001, gt=0)
    """How much each optimiser step adds to the bias of an expert with too few tokens, or takes where too many came."""


class Router(SoftmaxRouter):
    """The linear router, whose choice is among gate + bias; the weights are the gates without it.

    The bias is a buffer without gradient: the trainer calls `update` once a step with the counts of all its tokens.
    """

    bias: Tensor

    def __init__(self, dim: int, config: MoEConfig, init_std: float) -> None:
        super().__init__(dim, config, init_std)
        assert isinstance(config.router, Config)
        self.update_rate = config.router.update_rate
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def choice_bias(self) -> Tensor:
        """(E,)."""
        return self.bias

    def update(self, chosen_E: Tensor) -> None:
        """Raise the bias of the experts that were chosen less than on average, lower that of the others.

        Args:
            chosen_E: how often each expert was chosen in the whole step, dropped choices counted.
        """
        self.bias.add_(bias_change(chosen_E.to(self.bias.dtype), self.update_rate))


def bias_change(chosen_E: Tensor, rate: float) -> Tensor:
    """rate * sign(mean - count), for each expert (arXiv 2408.15664, algorithm 1)."""
    return rate * torch.sign(chosen_E.mean() - chosen_E)
