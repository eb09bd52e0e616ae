"""Counts of one sparse layer, modality and task. Their size does not depend on how many tokens are counted.

Axis letters: T tokens, K choices of a token, E experts, P places, J kinds of tokens, V words, C classes, B bins,
S sequences, F experts of the layer before, R shuffles.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlmoe_core.analysis.routing.tokens import KINDS, SHUFFLES, TokenFacts
from vlmoe_core.moe.plan import RoutingPlan

BINS = 20
"""Bins of entropy (0 to log E), of confidence (0 to 1) and of a sequence's share of dropped choices (0 to 1)."""


class Cell(NamedTuple):
    """What counts are kept for."""

    task: str
    """mlm, mim, vlm in pretraining; else the downstream task."""
    layer: int
    """0-based block."""
    modality: str
    """vision or text: of the tokens, whatever pool of experts they share."""


@dataclass(frozen=True)
class Sizes:
    """Lengths of the axes that the model or the data decide."""

    experts: int
    """E."""
    top_k: int
    """K."""
    places: int
    """P."""
    words: int
    """V; 0 for vision."""
    classes: int
    """C; 0: none."""


@dataclass(frozen=True)
class Tables:
    """Counts (int64) and sums (float64; float32 on MPS, which has no other) of one cell.

    All are sums over tokens, so that parts of them add up.
    """

    wanted_KE: Tensor
    """Choices of each expert, by rank of the choice."""
    got_KE: Tensor
    """Those of them that the expert had a place for."""
    gate_E: Tensor
    """Sum of the gates of all tokens, chosen or not (float64)."""
    entropy_B: Tensor
    """Tokens by the entropy of their gates: bin b is from b to b + 1 BINS-ths of log E."""
    confidence_B: Tensor
    """Tokens by their largest gate, from 0 to 1."""
    moments: Tensor
    """(4,) sum of entropy (nats), of its square, of the largest gate, of its square (float64)."""
    place_PE: Tensor
    """First choices by place in the image or text."""
    dropped_P: Tensor
    """Dropped choices, of any rank, by place."""
    kind_JE: Tensor
    """First choices by kind of token."""
    dropped_J: Tensor
    """Dropped choices by kind of token."""
    dropped_share_B: Tensor
    """Sequences by the share of their choices that was dropped."""
    together_EE: Tensor
    """How many tokens chose both experts; its diagonal how many chose the one."""
    word_VE: Tensor
    """First choices of words that the model sees, by id."""
    class_CE: Tensor
    """First choices by class of the example."""
    shuffled_class_RCE: Tensor
    """The same R times, classes dealt anew to the examples of each batch."""

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.wanted_KE[0].sum())


def empty_tables(modality: str, sizes: Sizes, device: torch.device) -> Tables:
    """Nothing counted yet."""
    experts, top_k, kinds = sizes.experts, sizes.top_k, len(KINDS[modality])

    wide = torch.float32 if device.type == "mps" else torch.float64

    def counts(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return Tables(
        wanted_KE=counts(top_k, experts),
        got_KE=counts(top_k, experts),
        gate_E=torch.zeros(experts, dtype=wide, device=device),
        entropy_B=counts(BINS),
        confidence_B=counts(BINS),
        moments=torch.zeros(4, dtype=wide, device=device),
        place_PE=counts(sizes.places, experts),
        dropped_P=counts(sizes.places),
        kind_JE=counts(kinds, experts),
        dropped_J=counts(kinds),
        dropped_share_B=counts(BINS),
        together_EE=counts(experts, experts),
        word_VE=counts(sizes.words, experts),
        class_CE=counts(sizes.classes, experts),
        shuffled_class_RCE=counts(SHUFFLES if sizes.classes else 0, sizes.classes, experts),
    )


@torch.no_grad()
def count(tables: Tables, plan: RoutingPlan, facts: TokenFacts) -> None:
    """Add the tokens of one plan to the tables, in place.

    Args:
        tables: of the plan's cell.
        plan: rows of the tokens of one modality.
        facts: of the same tokens, in the same order.
    """
    experts, (_, top_k) = tables.wanted_KE.shape[1], plan.expert_TK.shape
    dropped_TK = ~plan.kept_TK
    rank_TK = torch.arange(top_k, device=plan.expert_TK.device).expand_as(plan.expert_TK)
    _tally(tables.wanted_KE, rank_TK * experts + plan.expert_TK)
    _tally(tables.got_KE, (rank_TK * experts + plan.expert_TK)[plan.kept_TK])
    first_T, dropped_T = plan.expert_TK[:, 0], dropped_TK.sum(1)
    _tally(tables.place_PE, facts.place_T * experts + first_T)
    _tally(tables.kind_JE, facts.kind_T * experts + first_T)
    tables.dropped_P.index_add_(0, facts.place_T, dropped_T)
    tables.dropped_J.index_add_(0, facts.kind_T, dropped_T)
    for table, label_T in ((tables.word_VE, facts.word_T), (tables.class_CE, facts.class_T)):
        if table.shape[0]:
            known_T = label_T >= 0
            _tally(table, (label_T * experts + first_T)[known_T])
    _count_shuffled(tables, first_T, facts)
    pairs_TKK = plan.expert_TK[:, :, None] * experts + plan.expert_TK[:, None, :]
    _tally(tables.together_EE, pairs_TKK)
    _count_gates(tables, plan)
    _count_dropped_shares(tables, dropped_T, top_k, facts)


def _count_shuffled(tables: Tables, first_T: Tensor, facts: TokenFacts) -> None:
    table_RCE, class_RT = tables.shuffled_class_RCE, facts.shuffled_class_RT
    if class_RT is None or not table_RCE.shape[0]:
        return
    _, classes, experts = table_RCE.shape
    shuffle_R1 = torch.arange(class_RT.shape[0], device=class_RT.device)[:, None]
    place_RT = (shuffle_R1 * classes + class_RT) * experts + first_T
    _tally(table_RCE, place_RT[class_RT >= 0])


def _count_gates(tables: Tables, plan: RoutingPlan) -> None:
    wide_TE = plan.probs_TE.detach().to(tables.gate_E.dtype)
    entropy_T, confidence_T = torch.special.entr(wide_TE).sum(1), wide_TE.amax(1)
    most = max(math.log(wide_TE.shape[1]), torch.finfo(torch.float32).tiny)
    tables.gate_E.add_(wide_TE.sum(0))
    _tally(tables.entropy_B, _bin(entropy_T / most))
    _tally(tables.confidence_B, _bin(confidence_T))
    sums = [entropy_T.sum(), entropy_T.square().sum(), confidence_T.sum(), confidence_T.square().sum()]
    tables.moments.add_(torch.stack(sums))


def _count_dropped_shares(tables: Tables, dropped_T: Tensor, top_k: int, facts: TokenFacts) -> None:
    dropped_S = dropped_T.new_zeros(facts.num_sequences).index_add_(0, facts.sequence_T, dropped_T)
    tokens_S = torch.bincount(facts.sequence_T, minlength=facts.num_sequences)
    has_S = tokens_S > 0
    _tally(tables.dropped_share_B, _bin(dropped_S[has_S] / (top_k * tokens_S[has_S])))


def _bin(share_T: Tensor) -> Tensor:
    """Bin of each share from 0 to 1."""
    return (share_T * BINS).to(torch.int64).clamp(0, BINS - 1)


def _tally(table: Tensor, places: Tensor) -> None:
    """Add one to the places of a table, counted through its rows."""
    flat = places.reshape(-1)
    table.view(-1).index_add_(0, flat, torch.ones_like(flat))
