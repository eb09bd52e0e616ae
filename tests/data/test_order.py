"""Which example stands at a position: permutations, mixing counts, blocks."""

from collections import Counter
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.order import LONGEST_PERIOD, Mixture, Permutation, SourceOrder, derive_key, period_counts

KEYS = st.integers(0, 2**64 - 1)
RANDOM = SourceConfig(source="scenes")


def blocks_config(window: int) -> SourceConfig:
    return SourceConfig(source="scenes", order="blocks", window=window)


@given(st.integers(1, 5000), KEYS)
def test_a_permutation_holds_every_index_once(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [0, 5, 2**40])
def test_a_permutation_refuses_what_is_outside(size: int) -> None:
    for index in (-1, size):
        with pytest.raises(IndexError, match=f"index {index} is outside the permutation of {size}"):
            Permutation(size, 1)(index)


def test_a_permutation_of_a_trillion_needs_no_memory() -> None:
    permutation = Permutation(10**12, 7)
    places = [permutation(index) for index in range(1000)]
    assert len(set(places)) == 1000
    assert all(0 <= place < 10**12 for place in places)
    assert max(places) > 0.9 * 10**12 and min(places) < 0.1 * 10**12


def test_permutations_look_random() -> None:
    """Every place of a small permutation is hit about equally often over keys, and neighbours part."""
    hits = Counter((i, Permutation(7, derive_key("test", key))(i)) for key in range(3000) for i in range(7))
    assert len(hits) == 49
    assert all(abs(count - 3000 / 7) < 5 * (3000 / 7) ** 0.5 for count in hits.values())
    permutation = Permutation(5000, derive_key("neighbours"))
    close = sum(abs(permutation(i) - permutation(i + 1)) < 50 for i in range(4999))
    assert close < 150  # 100 expected


def test_keys_differ_by_every_part_and_never_change() -> None:
    keys = {derive_key(*parts) for parts in [(0, "image"), (1, "image"), (0, "text"), (0, "image", 0), (0, "image", 1)]}
    assert len(keys) == 5
    assert derive_key(0, "image", 1) == 160828963456822546


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_mixing_counts_are_exact_in_each_period(weights: list[int]) -> None:
    mixture = Mixture([float(w) for w in weights])
    for period in range(3):
        positions = range(period * mixture.period, (period + 1) * mixture.period)
        drawn = Counter(mixture(position)[0] for position in positions)
        for source, weight in enumerate(weights):
            assert Fraction(drawn[source], mixture.period) == Fraction(weight, sum(weights))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_the_numbers_of_each_source_rise_one_by_one(weights: list[int]) -> None:
    mixture = Mixture([float(w) for w in weights])
    drawn = [mixture(position) for position in range(4 * mixture.period)]
    for source, count in enumerate(mixture.counts):
        assert [number for s, number in drawn if s == source] == list(range(4 * count))
        for number in (0, count, 3 * count - 1):
            assert drawn[mixture.position_of(source, number)] == (source, number)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6))
def test_no_source_is_a_whole_place_ahead_of_its_share(weights: list[int]) -> None:
    mixture = Mixture([float(w) for w in weights])
    given_out = [0] * len(weights)
    for position in range(mixture.period):
        given_out[mixture(position)[0]] += 1
        for source, weight in enumerate(weights):
            assert given_out[source] < Fraction(weight * (position + 1), sum(weights)) + 1


def test_weights_are_taken_as_they_are_written_in_decimal() -> None:
    """0.1 + 0.2 + 0.7 is 1 exactly; in binary fractions the period would be astronomic."""
    assert Mixture([0.1, 0.2, 0.7]).counts == [1, 2, 7]
    assert Mixture([1.1, 2.2]).counts == [1, 2]
    assert Mixture([0.3, 0.1]).counts == [3, 1]
    assert Mixture([1e-4, 0.9999]).counts == [1, 9999]


def test_a_single_source_has_no_mixing() -> None:
    mixture = Mixture([0.3])
    assert [mixture(position) for position in (0, 1, 999)] == [(0, 0), (0, 1), (0, 999)]


def test_a_period_that_would_be_too_long_goes_by_largest_remainder() -> None:
    # Quotas of 10,000: 3333.33, 6666.66, 0.01 by weights over 3.00001 would need 300,001 places.
    counts = period_counts([Fraction(1), Fraction(2), Fraction("0.0001234567")])
    quotas = [LONGEST_PERIOD * w / Fraction("3.0001234567") for w in (1, 2, Fraction("0.0001234567"))]
    assert [int(q) for q in quotas] == [3333, 6666, 0]
    assert [round(float(q % 1), 2) for q in quotas] == [0.2, 0.39, 0.41]
    assert counts == [3333, 6666, 1]
    assert sum(counts) == LONGEST_PERIOD


def test_every_source_gets_a_place_however_small_its_weight() -> None:
    assert period_counts([Fraction(1), Fraction(1, 10**9)])[1] == 1


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(1, 50), KEYS)
def test_nothing_is_repeated_within_an_epoch(blocks: list[int], window: int, key: int) -> None:
    size = sum(blocks)
    for config in (RANDOM, blocks_config(window)):
        order = SourceOrder(config, blocks, key)
        for epoch in range(2):
            drawn = [order(number) for number in range(epoch * size, (epoch + 1) * size)]
            assert sorted(drawn) == list(range(size))


def test_epochs_have_orders_of_their_own() -> None:
    for config in (RANDOM, blocks_config(10)):
        order = SourceOrder(config, [50, 50], key=1)
        first, second = ([order(e * 100 + i) for i in range(100)] for e in range(2))
        assert first != second


def test_blocks_permutes_the_shards_and_then_each_window() -> None:
    """Windows of the size of a shard: each window reads one shard to its end, shuffled within."""
    order = SourceOrder(blocks_config(10), [10] * 8, key=3)
    drawn = [order(number) for number in range(80)]
    shards = [{index // 10 for index in drawn[w * 10 : w * 10 + 10]} for w in range(8)]
    assert all(len(shard) == 1 for shard in shards)
    visited = [shard.pop() for shard in shards]
    assert sorted(visited) == list(range(8)) and visited != list(range(8))
    assert any(drawn[w * 10 : w * 10 + 10] != sorted(drawn[w * 10 : w * 10 + 10]) for w in range(8))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 30), KEYS)
def test_a_window_holds_consecutive_examples_of_the_shard_sequence(blocks: list[int], window: int, key: int) -> None:
    """Sorted window by window, the order is that of whole shards one after the other."""
    size = sum(blocks)
    order = SourceOrder(blocks_config(window), blocks, key)
    drawn = [order(number) for number in range(size)]
    starts = [0, *accumulate(blocks)]
    shard_of = {i: s for s in range(len(blocks)) for i in range(starts[s], starts[s + 1])}
    shards = Permutation(len(blocks), derive_key(key, 0, "shards"))
    sequence = [i for n in range(len(blocks)) for i in range(starts[shards(n)], starts[shards(n) + 1])]
    for first in range(0, size, window):
        assert sorted(drawn[first : first + window]) == sorted(sequence[first : first + window])
    assert len({shard_of[i] for i in drawn}) == len(blocks)
