"""Measures of routing, from counts alone.

Axis letters: E and F experts, L labels, V words.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.analysis.routing.summary import CellComparison, Information, LikedWord
from vlmoe_core.analysis.routing.tables import Cell
from vlmoe_core.analysis.routing.tokens import SHUFFLES

Counts = NDArray[np.int64]
RARE = 128
"""Labels of at most so many tokens are shuffled token by token, others are drawn whole: what takes less time."""


def gini(load_E: Counts) -> float:
    """Gini coefficient of the load: 0 where it is even or there is none, 1 - 1/E where one expert has it all."""
    experts, total = len(load_E), int(load_E.sum())
    if not total:
        return 0.0
    rank_E = 2 * np.arange(1, experts + 1) - experts - 1
    return float((rank_E * np.sort(load_E)).sum() / (experts * total))


def variation(load_E: Counts) -> float:
    """Coefficient of variation of the load: its standard deviation (of a population) over its mean; 0 without load."""
    return float(load_E.std() / load_E.mean()) if load_E.any() else 0.0


def entropy(count_L: Counts) -> float:
    """Of the distribution that the counts are, in bits; 0 without counts."""
    total = int(count_L.sum())
    return max(0.0, float(np.log2(total)) - _log_sum(count_L) / total) if total else 0.0


def mutual_information(table_LE: Counts) -> float:
    """Of label and expert, in bits, as counted (without a correction for chance); 0 for an empty table."""
    shared = entropy(table_LE.sum(1)) + entropy(table_LE.sum(0)) - entropy(table_LE.ravel())
    return max(0.0, shared)


def _log_sum(counts: Counts) -> float:
    """Sum of n log2 n."""
    positive = counts[counts > 0].astype(np.float64)
    return float((positive * np.log2(positive)).sum())


def shuffled(label_L: Counts, load_E: Counts, rng: np.random.Generator) -> Counts:
    """A table (L, E) with these margins, as likely as when the labels of all tokens are shuffled.

    A frequent label draws its experts from what is left of the load, a multivariate hypergeometric draw. What then is
    left is dealt to the rare labels, token by token, so that memory is of the order of L, not of the tokens.

    Args:
        label_L: tokens of each label.
        load_E: tokens of each expert, as many in all and fewer than 1e9 (a limit of numpy).
        rng: what is drawn from.
    """
    experts, rare_L = len(load_E), label_L <= RARE
    table_LE, left_E = np.zeros((len(label_L), experts), np.int64), load_E.copy()
    for label in np.flatnonzero(~rare_L):
        table_LE[label] = rng.multivariate_hypergeometric(left_E, label_L[label])
        left_E -= table_LE[label]
    expert_T = rng.permutation(np.repeat(np.arange(experts), left_E))
    row_T = np.repeat(np.arange(rare_L.sum()), label_L[rare_L])
    dealt = np.bincount(row_T * experts + expert_T, minlength=int(rare_L.sum()) * experts)
    table_LE[rare_L] = dealt.reshape(-1, experts)
    return table_LE


def information(table_LE: Counts, shuffles: int = SHUFFLES, seed: int = 0) -> Information:
    """How much the expert tells of the label, beside what chance alone would make it tell.

    Counted mutual information is biased upwards by about (L - 1)(E - 1) / (2 T ln 2) bits (Miller 1955), more than
    many a true effect; the shuffled tables have the same margins, and so the same bias.

    Args:
        table_LE: tokens by label and expert; labels that never occur count for nothing.
        shuffles: how many tables are drawn.
        seed: of the draws.
    """
    seen_LE = table_LE[table_LE.any(1)]
    label_L, load_E = seen_LE.sum(1), seen_LE.sum(0)
    rng = np.random.default_rng(seed)
    return information_over(seen_LE, [shuffled(label_L, load_E, rng) for _ in range(shuffles)])


def information_over(table_LE: Counts, control_RLE: Iterable[Counts]) -> Information:
    """The same against tables whose labels were shuffled already: where the tokens of an example share their label."""
    bits, label_L = mutual_information(table_LE), table_LE.sum(1)
    chance = np.array([mutual_information(control_LE) for control_LE in control_RLE])
    low, high = bits - np.quantile(chance, (0.975, 0.025))
    return Information(
        bits, float(chance.mean()), float(low), float(high), int(np.count_nonzero(label_L)), entropy(label_L)
    )


def shared_information(table_EF: Counts) -> float:
    """Mutual information of two models' choices over the mean of their entropies, 0 to 1; blind to renumbering.

    1 also where each of the two has but one choice, 0 for an empty table.
    """
    if not table_EF.any():
        return 0.0
    mean = (entropy(table_EF.sum(1)) + entropy(table_EF.sum(0))) / 2
    return min(1.0, mutual_information(table_EF) / mean) if mean else 1.0


def compare(cell: Cell, table_EF: Counts) -> CellComparison:
    """Two models' first choices for the same tokens, counted by this model's expert (E) and the other's (F)."""
    tokens = int(table_EF.sum())
    numbers = min(table_EF.shape)
    here_E, there_F = table_EF.sum(1) / max(tokens, 1), table_EF.sum(0) / max(tokens, 1)
    return CellComparison(
        task=cell.task,
        layer=cell.layer,
        modality=cell.modality,
        tokens=tokens,
        same=float(np.trace(table_EF) / max(tokens, 1)),
        chance=float(here_E[:numbers] @ there_F[:numbers]),
        shared_information=shared_information(table_EF),
        counts=table_EF.tolist(),
    )


def liked_words(word_VE: Counts, pieces: Sequence[str], top: int, min_count: int) -> list[list[LikedWord]]:
    """The words of each expert (E lists) whose lift is above 1, the highest first, then by count, then by id.

    Args:
        word_VE: first choices of each word.
        pieces: the text of each id.
        top: at most so many words for an expert.
        min_count: words that occur less often are left out; a rare word's lift is mostly chance.
    """
    word_V, load_E = word_VE.sum(1), word_VE.sum(0)
    frequent_V, total = word_V >= max(min_count, 1), load_E.sum()
    found = []
    for load, count_V in zip(load_E, word_VE.T, strict=True):
        ids = np.flatnonzero(frequent_V & (count_V * total > word_V * load))
        share = count_V[ids] / word_V[ids]
        best = ids[np.lexsort((-count_V[ids], -share))][:top].tolist()
        lift_V = {i: float(count_V[i] / word_V[i] * (total / load)) for i in best}
        found.append([LikedWord(pieces[i], int(count_V[i]), lift_V[i]) for i in best])
    return found
