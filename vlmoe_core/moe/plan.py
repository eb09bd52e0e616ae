"""The routing plan: which expert each token goes to, with which weight, and in which of the expert's places.

Shapes: T tokens of one routing group, E experts, K choices of a token, N = T x K choices in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from vlmoe_core.moe.config import Priority, Removed, Weights


class Assignment(Protocol):
    """What experts need to know of a routing decision; the fields of the same names in `RoutingPlan`."""

    @property
    def expert_TK(self) -> Tensor: ...  # noqa: D102
    @property
    def weight_TK(self) -> Tensor: ...  # noqa: D102
    @property
    def slot_TK(self) -> Tensor: ...  # noqa: D102
    @property
    def kept_TK(self) -> Tensor: ...  # noqa: D102
    @property
    def capacity(self) -> int | None: ...  # noqa: D102
    @property
    def num_experts(self) -> int: ...  # noqa: D102
    @property
    def top_k(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class RoutingPlan:
    """Everything that experts, balance losses, logging and analysis need to know of one routing decision."""

    expert_TK: Tensor
    """The experts of each token, best first (int64)."""
    weight_TK: Tensor
    """Factor of each chosen expert's output; carries the router's gradient."""
    slot_TK: Tensor
    """Place of the choice in its expert's queue, from 0 (int64)."""
    kept_TK: Tensor
    """Whether the choice is computed: its slot is below the capacity, and its expert is there (bool)."""
    capacity: int | None
    """Places of each expert; None: dropless."""
    clean_logits_TE: Tensor
    """Router logits before noise."""
    noisy_logits_TE: Tensor
    """Router logits with noise; the clean ones where there is none."""
    probs_TE: Tensor
    """Softmax of the noisy logits: what choice, priority and weights come from."""
    noise_std: float
    """Standard deviation of the noise on the logits; 0: none."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs_TE.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_TK.shape[1]

    def tokens(self, start: int, stop: int) -> "RoutingPlan":
        """The plan's rows of some of its tokens: what one modality got of a pool that it shares with another."""
        return replace(
            self,
            expert_TK=self.expert_TK[start:stop],
            weight_TK=self.weight_TK[start:stop],
            slot_TK=self.slot_TK[start:stop],
            kept_TK=self.kept_TK[start:stop],
            clean_logits_TE=self.clean_logits_TE[start:stop],
            noisy_logits_TE=self.noisy_logits_TE[start:stop],
            probs_TE=self.probs_TE[start:stop],
        )

    def among(self, kept: Sequence[int]) -> "RoutingPlan":
        """The same plan for experts that are these alone, numbered from 0 in this order.

        No choice of another expert may be kept; it gets the number 0.
        """
        place = {expert: number for number, expert in enumerate(kept)}
        device = self.expert_TK.device
        number_E = torch.tensor([place.get(expert, 0) for expert in range(self.num_experts)], device=device)
        kept_E = torch.tensor(kept, device=device)
        return replace(
            self,
            expert_TK=number_E[self.expert_TK],
            clean_logits_TE=self.clean_logits_TE.index_select(1, kept_E),
            noisy_logits_TE=self.noisy_logits_TE.index_select(1, kept_E),
            probs_TE=self.probs_TE.index_select(1, kept_E),
        )


torch.export.register_dataclass(RoutingPlan, serialized_type_name=f"{__name__}.RoutingPlan")


def capacity_of(tokens: int, num_experts: int, top_k: int, factor: Fraction | None) -> int | None:
    """Places of each expert: max(1, ceil(k * T * factor / E)) in exact arithmetic; a factor of None is dropless.

    V-MoE (arXiv 2106.05974, section 2.1) without its rounding to a multiple of 4.
    """
    if factor is None:
        return None
    # Rounded up by a sum: torch 2.13's C++ code generator gets the floor of a negative symbolic quotient wrong.
    divisor = factor.denominator * num_experts
    rounded_up = (top_k * tokens * factor.numerator + divisor - 1) // divisor
    # sym_max, as the number of tokens is a symbol under torch.export.
    places: int = torch.sym_max(1, rounded_up)  # type: ignore[no-untyped-call]
    return places


def choose(scores_TE: Tensor, top_k: int) -> Tensor:
    """The `top_k` experts of the highest scores, best first, the lower number first where two are equal.

    torch.topk promises no order among equals.
    """
    left_TE = scores_TE.detach()
    chosen = []
    for _ in range(top_k):
        best_T1 = left_TE.argmax(dim=-1, keepdim=True)
        left_TE = left_TE.scatter(1, best_T1, -torch.inf)
        chosen.append(best_T1)
    return torch.cat(chosen, dim=1)


def combine_weights(probs_TE: Tensor, expert_TK: Tensor, weights: Weights) -> Tensor:
    """Factors of the chosen experts' outputs (T, K): the gates, these over their sum, or 1 with the gate's gradient."""
    gate_TK = probs_TE.gather(1, expert_TK)
    # A gate may have underflowed to 0, and be chosen for the bias of its expert.
    above_zero_TK = gate_TK.clamp_min(torch.finfo(gate_TK.dtype).tiny)
    if weights == "renormalised":
        return above_zero_TK / above_zero_TK.sum(dim=1, keepdim=True)
    if weights == "unit":
        return above_zero_TK / above_zero_TK.detach()
    return gate_TK


def assign_slots(expert_TK: Tensor, walk_T: Tensor | None, num_experts: int) -> Tensor:
    """Place of each choice in its expert's queue (T, K), from 0.

    The tokens are walked in the order `walk_T` (None: as they stand); all first choices go before any second choice.
    """
    tokens, top_k = expert_TK.shape
    walked_TK = expert_TK if walk_T is None else expert_TK.index_select(0, walk_T)
    slot_N = _rank_within_expert(walked_TK.t().reshape(-1), num_experts)
    slot_TK = slot_N.view(top_k, tokens).t()
    return slot_TK.contiguous() if walk_T is None else slot_TK.index_select(0, inverse(walk_T))


def _rank_within_expert(expert_N: Tensor, num_experts: int) -> Tensor:
    """How many earlier entries name the same expert."""
    sorted_N, order_N = expert_N.sort(stable=True)
    start_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=expert_N.device))
    place_N = torch.arange(expert_N.shape[0], device=expert_N.device)
    return (place_N - start_E.index_select(0, sorted_N)).index_select(0, inverse(order_N))


def inverse(permutation_N: Tensor) -> Tensor:
    """The permutation that undoes another.

    A sort, though writing 0, 1, ... to the places that the permutation names is less work: torch 2.13's inductor moves
    reads of the result before such a write (measured: wrong `kept_TK` in a compiled layer).
    """
    return permutation_N.argsort()


def priority_walk(probs_TE: Tensor, priority: Priority) -> Tensor | None:
    """The order in which tokens take places (T,); None: as they stand.

    gate: the token with the largest gate goes first, equal ones as they stand (batch-priority routing, V-MoE, arXiv
    2106.05974, section 4.1). random: any order, drawn from torch's default generator.
    """
    if priority == "gate":
        return probs_TE.detach().amax(dim=1).argsort(descending=True, stable=True)
    if priority == "random":
        return torch.rand(probs_TE.shape[0], device=probs_TE.device).argsort()
    return None


def make_plan(
    clean_logits_TE: Tensor,
    noisy_logits_TE: Tensor,
    *,
    top_k: int,
    weights: Weights,
    priority: Priority,
    capacity: int | None,
    noise_std: float,
    choice_bias_E: Tensor | None = None,
    kept: Sequence[int] | None = None,
    removed: Removed = "next",
) -> RoutingPlan:
    """The plan that follows from the router's logits.

    `choice_bias_E` is added to the gates for the choice alone: weights and priority come from the gates without it.
    Only the experts of `kept` are there (null: all). The others are not chosen (`removed` is next), or choices of them
    are not kept (drop); the gates are those over all experts.
    """
    probs_TE = noisy_logits_TE.softmax(dim=-1)
    scores_TE = probs_TE if choice_bias_E is None else probs_TE + choice_bias_E
    there_E = None if kept is None else _is_there(kept, probs_TE)
    if there_E is not None and removed == "next":
        scores_TE = scores_TE.masked_fill(~there_E, -torch.inf)
    expert_TK = choose(scores_TE, top_k)
    slot_TK = assign_slots(expert_TK, priority_walk(probs_TE, priority), probs_TE.shape[1])
    kept_TK = torch.ones_like(slot_TK, dtype=torch.bool) if capacity is None else slot_TK < capacity
    return RoutingPlan(
        expert_TK=expert_TK,
        weight_TK=combine_weights(probs_TE, expert_TK, weights),
        slot_TK=slot_TK,
        kept_TK=kept_TK if there_E is None else kept_TK & there_E[expert_TK],
        capacity=capacity,
        clean_logits_TE=clean_logits_TE,
        noisy_logits_TE=noisy_logits_TE,
        probs_TE=probs_TE,
        noise_std=noise_std,
    )


def _is_there(kept: Sequence[int], probs_TE: Tensor) -> Tensor:
    """(E,) bool."""
    return torch.tensor([expert in kept for expert in range(probs_TE.shape[1])], device=probs_TE.device)
