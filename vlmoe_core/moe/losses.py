"""Balance losses: pure functions of a routing plan, named as the papers name them.

Each loss is made of a statistic that adds up over tokens and a value that follows from the total, so that several
groups can be balanced as one: add their statistics, then ask for the value. A group without tokens gives 0.
Shapes: T tokens, E experts, S numbers of a statistic.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe_core.moe.config import BalanceConfig
from vlmoe_core.moe.plan import RoutingPlan


@dataclass(frozen=True)
class BalanceLoss:
    """A balance loss in its two halves."""

    statistic: Callable[[RoutingPlan], Tensor]
    """(S,), a sum over tokens."""
    value: Callable[[Tensor, BalanceConfig], Tensor]
    """Scalar, from a total of statistics."""
    size: Callable[[int], int]
    """S, from the number of experts."""


def importance_loss(plan: RoutingPlan) -> Tensor:
    """Squared variation of the experts' summed gates, those without noise (V-MoE, arXiv 2106.05974, App. A)."""
    return _squared_variation(_importance(plan))


def load_loss(plan: RoutingPlan) -> Tensor:
    """Squared variation of the experts' expected loads, were the noise drawn anew (V-MoE, App. A).

    An expert's load is the sum over tokens of the probability that its clean logit with new noise reaches the k-th
    largest noisy logit. Logits are compared with logits, on both sides.

    Raises:
        ValueError: the plan was made without noise; the loss is not defined then.
    """
    return _squared_variation(_load(plan))


def vloss(plan: RoutingPlan) -> Tensor:
    """Mean of importance and load loss (V-MoE, App. A)."""
    return 0.5 * (importance_loss(plan) + load_loss(plan))


def switch_loss(plan: RoutingPlan) -> Tensor:
    """E times the sum over experts of share of first choices x mean gate, those with noise; 1: balanced.

    The shares carry no gradient (Switch, arXiv 2101.03961, section 2.2; GShard, arXiv 2006.16668, algorithm 1).
    """
    return _switch_value(_switch(plan))


def z_loss(plan: RoutingPlan) -> Tensor:
    """Mean squared logsumexp of the logits, those without noise (ST-MoE, arXiv 2202.08906, section 3.3)."""
    return _mean(_z(plan))


def local_entropy_loss(plan: RoutingPlan, threshold: float | None = None) -> Tensor:
    """Mean entropy H of the tokens' gates, or max(0, H - threshold), in nats (LIMoE, arXiv 2206.02770, section 2.2)."""
    return _above(_mean(_local_entropy(plan)), threshold)


def global_entropy_loss(plan: RoutingPlan, threshold: float | None = None) -> Tensor:
    """-H of the tokens' mean gates, or max(0, threshold - H), in nats (LIMoE, section 2.2)."""
    return _global_value(_global(plan), threshold)


def statistics(plan: RoutingPlan, config: BalanceConfig) -> Tensor:
    """What the losses of non-zero weight need to know of a group, (S,); it adds up over groups."""
    return torch.cat([LOSSES[name].statistic(plan) for name in config.weights])


def num_statistics(config: BalanceConfig, num_experts: int) -> int:
    """S of `statistics`."""
    return sum(LOSSES[name].size(num_experts) for name in config.weights)


def weighted_sum(statistics_S: Tensor, config: BalanceConfig, num_experts: int) -> Tensor:
    """The weighted sum of the losses of non-zero weight, from the statistics of one group or the total of several."""
    parts = torch.split(statistics_S, [LOSSES[name].size(num_experts) for name in config.weights])
    terms = zip(config.weights.items(), parts, strict=True)
    return torch.stack([weight * LOSSES[name].value(part, config) for (name, weight), part in terms]).sum()


def balance_loss(plan: RoutingPlan, config: BalanceConfig) -> Tensor:
    """The weighted sum of the losses of one group; 0 where no loss has a weight."""
    if not config.weights:
        return plan.clean_logits_TE.new_zeros(())
    return weighted_sum(statistics(plan, config), config, plan.num_experts)


def _importance(plan: RoutingPlan) -> Tensor:
    return plan.clean_logits_TE.softmax(dim=-1).sum(dim=0)


def _load(plan: RoutingPlan) -> Tensor:
    if plan.noise_std == 0:
        raise ValueError(
            "the load loss is not defined for a plan without noise (in evaluation, or noise 0): weigh it with 0"
        )
    threshold_T1 = plan.noisy_logits_TE.topk(plan.top_k, dim=-1).values[:, -1:]
    reached_TE: Tensor = torch.special.ndtr((plan.clean_logits_TE - threshold_T1) / plan.noise_std)
    return reached_TE.sum(dim=0)


def _squared_variation(amount_E: Tensor) -> Tensor:
    """(std / mean)^2, population. The clamp matters for a group without tokens alone, whose mean is 0."""
    mean = amount_E.mean()
    return amount_E.var(correction=0) / mean.square().clamp_min(torch.finfo(amount_E.dtype).tiny)


def _switch(plan: RoutingPlan) -> Tensor:
    experts_E = torch.arange(plan.num_experts, device=plan.expert_TK.device)
    first_E = (plan.expert_TK[:, :1] == experts_E).sum(dim=0)
    return torch.cat([first_E.to(plan.probs_TE.dtype), plan.probs_TE.sum(dim=0)])


def _switch_value(total_S: Tensor) -> Tensor:
    first_E, gate_E = total_S.chunk(2)
    tokens = first_E.sum().clamp_min(1)
    return first_E.shape[0] * (first_E * gate_E).sum() / tokens.square()


def _z(plan: RoutingPlan) -> Tensor:
    return _with_count(plan.clean_logits_TE.logsumexp(dim=-1).square().sum().view(1), plan)


def _local_entropy(plan: RoutingPlan) -> Tensor:
    return _with_count(_entropy(plan.clean_logits_TE.softmax(dim=-1)).sum().view(1), plan)


def _global(plan: RoutingPlan) -> Tensor:
    return _with_count(_importance(plan), plan)


def _global_value(total_S: Tensor, threshold: float | None) -> Tensor:
    gates_E, tokens = total_S[:-1], total_S[-1]
    # Without tokens the gates' sums are 0, and so are the entropy and its gradient.
    spread = _entropy(gates_E / tokens.clamp_min(1))
    return -spread if threshold is None else torch.where(tokens > 0, (threshold - spread).relu(), 0.0)


def _entropy(probs: Tensor) -> Tensor:
    """Of the last dimension, in nats. A probability that underflowed counts 0, without an infinite gradient."""
    return -torch.xlogy(probs, probs.clamp_min(torch.finfo(probs.dtype).tiny)).sum(dim=-1)


def _with_count(sums_S: Tensor, plan: RoutingPlan) -> Tensor:
    return torch.cat([sums_S, sums_S.new_full((1,), plan.expert_TK.shape[0])])


def _mean(total_2: Tensor) -> Tensor:
    return total_2[0] / total_2[1].clamp_min(1)


def _above(value: Tensor, threshold: float | None) -> Tensor:
    return value if threshold is None else (value - threshold).relu()


LOSSES = {
    "importance": BalanceLoss(_importance, lambda total, _: _squared_variation(total), lambda experts: experts),
    "load": BalanceLoss(_load, lambda total, _: _squared_variation(total), lambda experts: experts),
    "switch": BalanceLoss(_switch, lambda total, _: _switch_value(total), lambda experts: 2 * experts),
    "z": BalanceLoss(_z, lambda total, _: _mean(total), lambda _: 2),
    "local_entropy": BalanceLoss(
        _local_entropy, lambda total, config: _above(_mean(total), config.local_entropy_threshold), lambda _: 2
    ),
    "global_entropy": BalanceLoss(
        _global,
        lambda total, config: _global_value(total, config.global_entropy_threshold),
        lambda experts: experts + 1,
    ),
}
"""The losses that a recipe can give a weight; `vloss` is half `importance`, half `load`."""
