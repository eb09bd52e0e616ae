"""Balance losses: pure functions of a routing plan (V-MoE, arXiv 2106.05974, App. A).

Each is a squared coefficient of variation over the experts, var / mean^2 with the population variance; 0 for a group
without tokens. Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor

from vlmoe_core.moe.config import BalanceConfig
from vlmoe_core.moe.plan import RoutingPlan


def importance_loss(plan: RoutingPlan) -> Tensor:
    """Variation of the experts' summed gates, those without noise."""
    return _squared_variation(plan.clean_logits_TE.softmax(dim=-1).sum(dim=0))


def load_loss(plan: RoutingPlan) -> Tensor:
    """Variation of the experts' expected loads, were the noise drawn anew.

    An expert's load is the sum over tokens of the probability that its clean logit with new noise reaches the k-th
    largest noisy logit. Logits are compared with logits, on both sides.

    Raises:
        ValueError: the plan was made without noise; the loss is not defined then.
    """
    if plan.noise_std == 0:
        raise ValueError(
            "the load loss is not defined for a plan without noise (in evaluation, or noise 0): weigh it with 0"
        )
    threshold_T1 = plan.noisy_logits_TE.topk(plan.top_k, dim=-1).values[:, -1:]
    reached_TE = torch.special.ndtr((plan.clean_logits_TE - threshold_T1) / plan.noise_std)
    return _squared_variation(reached_TE.sum(dim=0))


def vloss(plan: RoutingPlan) -> Tensor:
    """Mean of importance and load loss."""
    return 0.5 * (importance_loss(plan) + load_loss(plan))


def balance_losses(plan: RoutingPlan, config: BalanceConfig) -> dict[str, Tensor]:
    """The losses of non-zero weight that the plan defines, by name and not yet weighted.

    A plan without noise (evaluation) defines neither `load` nor `vloss`.
    """
    losses: dict[str, Tensor] = {}
    if config.importance:
        losses["importance"] = importance_loss(plan)
    if config.load and plan.noise_std:
        losses["load"] = load_loss(plan)
    if config.vloss and plan.noise_std:
        losses["vloss"] = vloss(plan)
    return losses


def balance_loss(plan: RoutingPlan, config: BalanceConfig) -> Tensor:
    """Weighted sum of `balance_losses`; 0 where there are none."""
    total = plan.clean_logits_TE.new_zeros(())
    for name, value in balance_losses(plan, config).items():
        total = total + getattr(config, name) * value
    return total


def _squared_variation(amount_E: Tensor) -> Tensor:
    """(std / mean)^2. The clamp matters for a group without tokens alone, whose mean is 0."""
    mean = amount_E.mean()
    return amount_E.var(correction=0) / mean.square().clamp_min(torch.finfo(amount_E.dtype).tiny)
