"""Measures equal hand formulas and loops over tokens; the control is distributed as really shuffled labels are."""

import math
import statistics
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from vlmoe_core.analysis.routing import measures
from vlmoe_core.analysis.routing.measures import (
    compare,
    entropy,
    gini,
    information,
    liked_words,
    mutual_information,
    shared_information,
    shuffled,
    variation,
)
from vlmoe_core.analysis.routing.tables import Cell

Table = NDArray[np.int64]
TABLES = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 40))
LOADS = arrays(np.int64, st.integers(1, 8), elements=st.integers(0, 1000))


def bits_by_loop(table: list[list[int]]) -> float:
    """Sum of p log2 (p / (q r)) over the cells."""
    total = sum(map(sum, table))
    rows, columns = [sum(row) for row in table], [sum(column) for column in zip(*table, strict=True)]
    found = 0.0
    for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
        if table[i][j]:
            found += table[i][j] / total * math.log2(table[i][j] * total / (row * column))
    return found


def tabulate(labels: Table, experts: Table, shape: tuple[int, int]) -> Table:
    table = np.zeros(shape, np.int64)
    for label, expert in zip(labels.tolist(), experts.tolist(), strict=True):
        table[label, expert] += 1
    return table


def random_table(seed: int, labels: int, experts: int, tokens: int) -> Table:
    rng = np.random.default_rng(seed)
    weights = np.outer(1 / np.arange(1, labels + 1), rng.dirichlet(np.ones(experts))).ravel()
    return rng.multinomial(tokens, weights / weights.sum()).reshape(labels, experts)


@given(LOADS)
def test_gini_is_half_the_relative_mean_difference(load: Table) -> None:
    values = load.tolist()
    pairs = sum(abs(a - b) for a in values for b in values)
    expected = pairs / (2 * len(values) * sum(values)) if sum(values) else 0.0
    assert gini(load) == pytest.approx(expected)


@given(LOADS)
def test_variation_is_deviation_over_mean(load: Table) -> None:
    values = load.tolist()
    expected = statistics.pstdev(values) / statistics.mean(values) if sum(values) else 0.0
    assert variation(load) == pytest.approx(expected)


def test_an_even_load_and_one_expert_with_all() -> None:
    even, one = np.full(8, 5), np.array([0, 0, 40, 0])
    assert (gini(even), variation(even)) == (0, 0)
    assert gini(one) == pytest.approx(3 / 4)
    assert variation(one) == pytest.approx(math.sqrt(3))
    assert (gini(np.array([7])), variation(np.array([7]))) == (0, 0)


@given(TABLES)
def test_mutual_information_is_the_sum_over_cells(table: Table) -> None:
    expected = bits_by_loop(table.tolist()) if table.any() else 0.0
    assert mutual_information(table) == pytest.approx(expected, abs=1e-9)
    assert mutual_information(table.T.copy()) == pytest.approx(expected, abs=1e-9)


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.diag([3, 3, 3, 3])) == pytest.approx(2)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    assert entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5)


@settings(max_examples=50, deadline=None)
@given(TABLES, st.sampled_from([0, 10, 128]), st.integers(0, 5))
def test_a_shuffled_table_has_the_margins(table: Table, rare: int, seed: int) -> None:
    labels, loads = table.sum(1), table.sum(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "RARE", rare)
        drawn = shuffled(labels, loads, np.random.default_rng(seed))
    assert (drawn >= 0).all()
    assert drawn.sum(1).tolist() == labels.tolist()
    assert drawn.sum(0).tolist() == loads.tolist()


@pytest.mark.parametrize("rare", [0, 2, 128], ids=["all rows drawn", "both ways", "all tokens dealt"])
def test_a_shuffled_table_is_as_likely_as_among_all_permutations(rare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "RARE", rare)
    labels, experts = [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2]
    exact: Counter[tuple[int, ...]] = Counter()
    for order in permutations(range(7)):
        cells = Counter((labels[i], expert) for i, expert in zip(order, experts, strict=True))
        exact[tuple(cells[cell] for cell in product(range(3), range(3)))] += 1
    rng, draws = np.random.default_rng(1), 6000
    margins = np.array([3, 2, 2]), np.array([2, 3, 2])
    found = Counter(tuple(shuffled(*margins, rng).ravel().tolist()) for _ in range(draws))
    assert found.keys() <= exact.keys()
    expected = {table: draws * number / math.factorial(7) for table, number in exact.items()}
    chi_square = sum((found[table] - e) ** 2 / e for table, e in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("rare", [0, 20, 128])
def test_information_of_the_draws_is_that_of_shuffled_labels(rare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "RARE", rare)
    table = random_table(3, labels=30, experts=6, tokens=600)
    table = table[table.any(1)]
    labels, experts = (np.repeat(axis.ravel(), table.ravel()) for axis in np.indices(table.shape))
    rng, times = np.random.default_rng(0), 500
    really = sorted(
        bits_by_loop(tabulate(rng.permutation(labels), experts, table.shape).tolist()) for _ in range(times // 5)
    )
    drawn = sorted(mutual_information(shuffled(table.sum(1), table.sum(0), rng)) for _ in range(times))
    assert statistics.mean(drawn) == pytest.approx(statistics.mean(really), rel=0.03)
    steps = [abs(np.searchsorted(drawn, bits) / times - n / len(really)) for n, bits in enumerate(really)]
    assert max(steps) < 1.95 * math.sqrt(1 / times + 1 / len(really)), "Kolmogorov-Smirnov at 0.1 %"


def test_a_planted_expert_tells_all_of_the_label() -> None:
    found = information(np.diag([50, 50, 50, 50]))
    assert found.bits == pytest.approx(2)
    assert found.label_bits == pytest.approx(2)
    assert found.labels == 4
    assert 1.8 < found.low <= found.excess <= found.high < found.bits


def test_an_expert_that_knows_nothing_has_an_interval_around_zero() -> None:
    covered = 0
    for seed in range(60):
        found = information(random_table(seed, labels=40, experts=8, tokens=500), seed=seed)
        assert found.bits > 0.1, "chance alone makes the counted information positive"
        covered += found.low <= 0 <= found.high
    assert covered >= 48


def test_the_control_is_about_the_known_bias() -> None:
    table = random_table(0, labels=6, experts=5, tokens=20_000)
    bias = (6 - 1) * (5 - 1) / (2 * 20_000 * math.log(2))
    assert information(table, shuffles=300).control == pytest.approx(bias, rel=0.1)


def test_information_ignores_labels_that_never_occur_and_is_repeatable() -> None:
    table = random_table(5, labels=12, experts=4, tokens=300)
    sparse = np.zeros((36, 4), np.int64)
    sparse[::3] = table
    assert information(sparse, seed=2) == information(table[table.any(1)], seed=2)
    assert information(table, seed=2) != information(table, seed=3)


def test_information_does_not_depend_on_the_experts_numbers() -> None:
    table = random_table(6, labels=20, experts=5, tokens=2000)
    one, other = information(table, shuffles=200), information(table[:, [3, 1, 4, 0, 2]], shuffles=200)
    assert other.bits == pytest.approx(one.bits)
    assert other.control == pytest.approx(one.control, rel=0.05)
    assert (other.labels, other.label_bits) == (one.labels, one.label_bits)


@pytest.mark.parametrize("shape", [(0, 4), (5, 4), (3, 1), (1, 3)])
def test_information_of_tables_that_tell_nothing(shape: tuple[int, int]) -> None:
    table = np.zeros(shape, np.int64) if shape[1] == 4 else np.full(shape, 7)
    found = information(table)
    assert [found.bits, found.control, found.low, found.high] == pytest.approx([0, 0, 0, 0], abs=1e-12)
    assert found.labels == (0 if shape[1] == 4 else shape[0])


def test_the_memory_of_a_shuffle_does_not_grow_with_the_tokens() -> None:
    peaks = []
    for tokens in (10**6, 9 * 10**8):
        table = np.full((50, 4), tokens // 200)
        tracemalloc.start()
        information(table, shuffles=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0] + 10_000


def test_the_same_choices_renumbered_share_everything() -> None:
    load = np.array([5, 9, 2, 7])
    assert shared_information(np.diag(load)) == pytest.approx(1)
    assert shared_information(np.diag(load)[:, [2, 0, 3, 1]]) == pytest.approx(1)
    assert shared_information(np.outer([1, 2], [3, 4, 5])) == pytest.approx(0, abs=1e-12)
    assert shared_information(np.array([[9]])) == 1
    assert shared_information(np.array([[4, 5]])) == 0
    assert shared_information(np.zeros((3, 3), np.int64)) == 0


@given(TABLES)
def test_shared_information_is_normalised(table: Table) -> None:
    found = shared_information(table)
    assert 0 <= found <= 1
    assert found == pytest.approx(shared_information(table.T.copy()))
    mean = (entropy(table.sum(0)) + entropy(table.sum(1))) / 2
    if mean > 1e-9:
        assert found == pytest.approx(bits_by_loop(table.tolist()) / mean, abs=1e-9)


def test_compare_counts_equal_numbers_and_those_of_chance() -> None:
    rng = np.random.default_rng(0)
    here, there = rng.integers(0, 3, 400), rng.integers(0, 5, 400)
    found = compare(Cell("vlm", 3, "text"), tabulate(here, there, (3, 5)))
    assert (found.task, found.layer, found.modality, found.tokens) == ("vlm", 3, "text", 400)
    assert found.same == pytest.approx(sum(a == b for a, b in zip(here, there, strict=True)) / 400)
    pairs = sum(a == b for a in here.tolist() for b in there.tolist())
    assert found.chance == pytest.approx(pairs / 400**2)
    assert sum(map(sum, found.counts)) == 400
    assert found.shared_information < 0.1


def test_compare_with_itself_and_of_no_token() -> None:
    same = compare(Cell("mim", 1, "vision"), np.diag([3, 1]))
    assert (same.same, same.chance, same.shared_information) == (1, 10 / 16, 1)
    none = compare(Cell("mim", 1, "vision"), np.zeros((2, 2), np.int64))
    assert (none.tokens, none.same, none.chance, none.shared_information) == (0, 0, 0, 0)


@given(
    arrays(np.int64, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.integers(0, 6)),
    st.integers(0, 5),
    st.integers(0, 12),
)
def test_liked_words_are_those_of_highest_lift(table: Table, top: int, min_count: int) -> None:
    counts = table.tolist()
    pieces = [f"w{i}" for i in range(len(counts))]
    total = sum(map(sum, counts))
    for expert, liked in enumerate(liked_words(table, pieces, top, min_count)):
        load, ranked = sum(row[expert] for row in counts), []
        for i, row in enumerate(counts):
            if row[expert] and sum(row) >= min_count:
                lift = Fraction(row[expert], load) / Fraction(sum(row), total)
                ranked.append((-lift, -row[expert], i))
        expected = [(i, -count, -lift) for lift, count, i in sorted(ranked) if -lift > 1][:top]
        assert [(word.word, word.count) for word in liked] == [(pieces[i], count) for i, count, _ in expected]
        assert [word.lift for word in liked] == pytest.approx([float(lift) for _, _, lift in expected])


def test_liked_words_break_ties_by_count_then_id() -> None:
    table = np.array([[2, 0], [4, 0], [2, 0], [0, 9]])
    [first, second] = liked_words(table, ["a", "b", "c", "d"], top=3, min_count=1)
    assert [(word.word, word.count) for word in first] == [("b", 4), ("a", 2), ("c", 2)]
    assert [word.lift for word in first] == pytest.approx([17 / 8] * 3)
    assert [word.word for word in second] == ["d"]


def test_one_expert_likes_no_word_more_than_others_do() -> None:
    assert liked_words(np.array([[5], [50]]), ["a", "b"], top=3, min_count=1) == [[]]
