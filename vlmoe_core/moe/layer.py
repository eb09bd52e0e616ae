"""The sparse feed-forward layer: a router and its experts.

Shapes: T tokens of one routing group, D width.
"""

from torch import Tensor, nn

from vlmoe_core.config import plugin_module
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.experts import Experts
from vlmoe_core.moe.plan import RoutingPlan


class SparseFFN(nn.Module):
    """A feed-forward layer of which each token uses the `top_k` experts that its router chooses.

    The router is the class `Router` of the file in vlmoe_core/moe/routers that the config names.
    State: `router.weight`, `experts.{up,down}.{weight,bias}`.
    """

    def __init__(self, dim: int, hidden: int, config: MoEConfig, init_std: float) -> None:
        super().__init__()
        self.router: nn.Module = plugin_module("vlmoe_core.moe.routers", config.router).Router(dim, config, init_std)
        self.experts = Experts(config.num_experts, dim, hidden, init_std=init_std, implementation=config.experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, RoutingPlan]:
        """x_TD (T, D), the tokens of one routing group -> their update (T, D), 0 for dropped ones, and the plan."""
        plan: RoutingPlan = self.router(x_TD)
        return self.experts(x_TD, plan), plan
