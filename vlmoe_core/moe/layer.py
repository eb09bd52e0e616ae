"""The sparse feed-forward layer: a router and its experts.

Shapes: T tokens of one routing group, D width.
"""

from torch import Tensor, nn

from vlmoe_core.config import plugin_module
from vlmoe_core.moe.config import ROUTERS, MoEConfig
from vlmoe_core.moe.dense import DenseFFN
from vlmoe_core.moe.experts import Experts
from vlmoe_core.moe.plan import RoutingPlan


class SparseFFN(nn.Module):
    """A feed-forward layer of which each token uses the `top_k` experts that its router chooses.

    The router is the class `Router` of the file in vlmoe_core/moe/routers that the config names. Of the experts that it
    knows only those of `kept` are there, numbered in this order in the state; plans have the router's numbers.
    State: `router.*`, `experts.{up,down}.{weight,bias}`, `experts.norm.{weight,bias}` where there is a sub-norm, and
    `shared_expert.*` where there is one.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        config: MoEConfig,
        init_std: float,
        sub_norm_eps: float | None = None,
        kept: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.kept = kept
        self.router: nn.Module = plugin_module(ROUTERS.package, config.router.name).Router(dim, config, init_std)
        self.experts = Experts(
            config.num_experts if kept is None else len(kept),
            dim,
            hidden,
            init_std=init_std,
            implementation=config.experts,
            dropout=config.expert_dropout,
            sub_norm_eps=sub_norm_eps,
        )
        self.shared_expert = DenseFFN(dim, hidden, sub_norm_eps) if config.shared_expert else None

    def forward(self, x_TD: Tensor, identity_T: Tensor | None = None) -> tuple[Tensor, RoutingPlan]:
        """The tokens of one routing group -> their update (T, D), and the plan.

        A dropped token's update is 0, or the shared expert's where there is one.

        Args:
            x_TD: (T, D).
            identity_T: (T,) what each token is; the hash router asks for it.
        """
        plan: RoutingPlan = self.router(x_TD, identity_T, self.kept)
        return self.experts(x_TD, plan if self.kept is None else plan.among(self.kept), self.shared_expert), plan
