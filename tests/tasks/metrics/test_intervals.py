import tracemalloc
from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.errors import DataError
from vlmoe_core.tasks.metrics import intervals
from vlmoe_core.tasks.metrics.intervals import bootstrap, bootstrap_sum, paired_test


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def every_resample(values, groups):
    """Means of all equally likely resamples of the groups."""
    names = sorted(set(groups))
    means = []
    for drawn in product(names, repeat=len(names)):
        chosen = [value for name in drawn for value, group in zip(values, groups, strict=True) if group == name]
        means.append(sum(chosen) / len(chosen))
    return np.array(means)


def between(means, level, slack):
    """Bounds for each end of the interval: quantiles a little further out and a little further in."""
    tail = (1 - level) / 2
    low = np.quantile(means, (max(0, tail - slack), tail + slack), method="closest_observation")
    high = np.quantile(means, (1 - tail - slack, min(1, 1 - tail + slack)), method="closest_observation")
    return low, high


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 1], ["b", "a", "c", "a", "d"]])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_against_every_resample(groups, level):
    values = [0.0, 0.3, 1.0, 0.3, 0.85]
    low, high = bootstrap(values, groups, level=level, samples=20_000)
    (low_from, low_to), (high_from, high_to) = between(every_resample(values, groups), level, 0.01)
    assert low_from - 1e-9 <= low <= low_to + 1e-9
    assert high_from - 1e-9 <= high <= high_to + 1e-9


def test_bootstrap_of_many_is_the_normal_interval(rng):
    values = rng.choice([0, 0.3, 0.6, 0.9, 1], size=4000)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half / 8)
    assert high == pytest.approx(values.mean() + half, abs=half / 8)


def test_five_equal_captions_are_one_picture(rng):
    right = rng.integers(0, 2, size=100).astype(float)
    images = np.arange(100)
    clustered = bootstrap(right.repeat(5), images.repeat(5))
    assert clustered == pytest.approx(bootstrap(right))
    assert np.ptp(bootstrap(right.repeat(5))) < 0.6 * np.ptp(clustered)


def test_the_interval_of_a_sum_against_every_resample():
    """Three pictures, six captions of different numbers a picture, two metrics: every draw of three pictures."""
    images, image_groups = [1.0, 0.0, 1.0], [7, 3, 5]
    texts, text_groups = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [7, 7, 7, 5, 5, 3]
    sums = []
    for drawn in product([7, 3, 5], repeat=3):
        a = [v for g in drawn for v, own in zip(images, image_groups, strict=True) if own == g]
        b = [v for g in drawn for v, own in zip(texts, text_groups, strict=True) if own == g]
        sums.append(sum(a) / len(a) + sum(b) / len(b))
    wanted = np.quantile(sums, (0.1, 0.9))
    got = bootstrap_sum([images, texts], [image_groups, text_groups], level=0.8, samples=20_000)
    assert got == pytest.approx(wanted, abs=0.02)


def test_the_sum_of_one_metric_is_the_metric(rng):
    values, groups = rng.random(40), rng.integers(0, 9, 40)
    assert bootstrap_sum([values], [groups]) == bootstrap(values, groups)
    twice = bootstrap_sum([values, values], [groups, groups])
    assert twice == pytest.approx([2 * end for end in bootstrap(values, groups)])


def test_a_group_each_is_no_group(rng):
    values = rng.random(50)
    assert bootstrap(values, [f"q{i}" for i in range(50)]) == bootstrap(values)


def test_the_seed_decides_and_the_order_does_not(rng):
    values = rng.random(60)
    assert bootstrap(values, seed=3) == bootstrap(values[::-1], seed=3) != bootstrap(values, seed=4)
    wider = bootstrap(values, level=0.99)
    assert wider[0] < bootstrap(values)[0] < bootstrap(values)[1] < wider[1]


def test_constant_values_have_no_width():
    assert bootstrap([0.25] * 7) == (0.25, 0.25)
    assert bootstrap([1.0]) == (1, 1)


@given(st.lists(st.sampled_from([0, 0.3, 0.6, 0.9, 1]), min_size=1, max_size=9))
def test_interval_lies_within_the_values(values):
    low, high = bootstrap(values, samples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_chunks_change_nothing(monkeypatch, rng):
    a, b = rng.random(40), rng.random(40)
    whole = [*bootstrap(a), *paired_test(a, b).interval, paired_test(a, b).p_value]
    monkeypatch.setattr(intervals, "CHUNK", 100)
    assert [*bootstrap(a), *paired_test(a, b).interval, paired_test(a, b).p_value] == pytest.approx(whole, rel=1e-12)


def test_memory_is_bounded(rng):
    values = rng.random(100_000)
    tracemalloc.start()
    bootstrap(values, samples=12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def exact_p(differences):
    """Share of all sign patterns whose sum is at least as far from 0."""
    far = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=9)]
    return sum(value >= far - 1e-9 for value in sums) / len(sums)


@pytest.mark.parametrize("seed", range(4))
def test_p_value_against_every_sign(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.choice([0, 0.3, 0.6, 0.9, 1], size=(2, 9))
    found = paired_test(a + 0.2, b, samples=20_000)
    exact = exact_p(list(a + 0.2 - b))
    assert found.p_value == pytest.approx(exact, abs=4 * sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_groups_flip_as_a_whole(rng):
    a, b = rng.random(9), rng.random(9)
    alone = paired_test(a, b, samples=500)
    repeated = paired_test(a.repeat(4), b.repeat(4), np.arange(9).repeat(4), samples=500)
    assert repeated.p_value == pytest.approx(alone.p_value)
    assert repeated.difference == pytest.approx(alone.difference)
    assert repeated.interval == pytest.approx(alone.interval)


def test_comparison_by_hand():
    same = paired_test([1, 0, 1], [1, 0, 1])
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)
    better = paired_test([1] * 40, [1] * 20 + [0] * 20)
    assert better.difference == 0.5
    assert 0.3 < better.interval[0] < 0.5 < better.interval[1] < 0.7
    assert better.p_value == pytest.approx(1 / 2001)
    worse = paired_test([1] * 20 + [0] * 20, [1] * 40)
    assert worse.difference == -0.5
    assert worse.p_value == better.p_value
    swapped = paired_test([1, 0] * 20, [0, 1] * 20)
    assert swapped.p_value == 1


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(5)
    found = [paired_test(*rng.normal(size=(2, 30)), samples=99, seed=i).p_value for i in range(200)]
    assert 0.02 <= np.mean(np.array(found) <= 0.1) <= 0.18


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"one value for each example"):
        bootstrap([])
    with pytest.raises(DataError, match=r"shape \(1, 2\)"):
        bootstrap([[1, 2]])
    with pytest.raises(DataError, match="2 values but 1 groups"):
        bootstrap([1, 2], ["a"])
    with pytest.raises(DataError, match="2 and 3 examples can't be paired"):
        paired_test([1, 2], [1, 2, 3])
