"""Router health from the plan that computed the output: no second pass, and no wait for the device.

Counts are additive: sum the tallies of a layer over micro-batches and ranks, then ask for the health of the sum, so
that an expert is dead only if no micro-batch used it. Shapes: T tokens, E experts, K choices of a token.
"""

import torch
from torch import Tensor

from vlmoe_core.moe.plan import RoutingPlan


def tally(plan: RoutingPlan) -> Tensor:
    """Counts of one group (E + 3,): choices of each expert, dropped choices, sum of the tokens' entropies, tokens."""
    experts_E = torch.arange(plan.num_experts, device=plan.expert_TK.device)
    chosen_E = (plan.expert_TK.reshape(-1, 1) == experts_E).sum(dim=0)
    entropy = torch.special.entr(plan.probs_TE.detach()).sum()
    tokens = torch.full_like(entropy, plan.expert_TK.shape[0])
    return torch.cat(
        [chosen_E.to(entropy.dtype), torch.stack([(~plan.kept_TK).sum().to(entropy.dtype), entropy, tokens])]
    )


def chosen(counts: Tensor) -> Tensor:
    """How often each expert was chosen (E,), from (a sum of) tallies."""
    return counts[:-3]


def health_of(counts: Tensor) -> dict[str, Tensor]:
    """Health from (a sum of) tallies, as scalars on the device; all 0 but `dead` where there were no tokens.

    busiest: share of all choices that went to the busiest expert. dead: number of experts that no token chose.
    dropped: share of the choices that found no place. entropy: mean over tokens of the router's entropy, in nats.
    """
    chosen_E, (dropped, entropy, tokens) = chosen(counts), counts[-3:].unbind()
    choices = chosen_E.sum().clamp_min(1)
    return {
        "busiest": chosen_E.max() / choices,
        "dead": (chosen_E == 0).sum(),
        "dropped": dropped / choices,
        "entropy": entropy / tokens.clamp_min(1),
    }


def router_health(plan: RoutingPlan) -> dict[str, Tensor]:
    """`health_of` one plan."""
    return health_of(tally(plan))
