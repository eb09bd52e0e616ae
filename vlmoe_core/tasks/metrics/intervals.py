"""How sure is a mean: percentile bootstrap intervals, and a paired test of two models on the same examples.

To resample N examples is to draw how often each distinct value occurs, one multinomial draw a sample. That is the same
bootstrap, and it costs the number of distinct values, not N: five for VQA, two for an accuracy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmoe_core.errors import DataError

CHUNK = 1 << 20
"""Most counts that are drawn at once (8 bytes each)."""

Groups = Sequence[str] | Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples."""

    difference: float
    """Mean of a minus mean of b."""
    interval: tuple[float, float]
    """Bootstrap interval of the difference."""
    p_value: float
    """Two-sided: how often random signs of the differences give a mean as far from 0."""


@dataclass(frozen=True)
class _Units:
    """What is drawn as one: an example or a group, with its part in M metrics. Equal units stand here once."""

    sums: NDArray[np.float64]
    """Sum of the values of the unit (U, M)."""
    sizes: NDArray[np.float64]
    """Number of its examples (U, M)."""
    counts: NDArray[np.int64]
    """How many such units there are (U,)."""


def bootstrap(
    values: ArrayLike, groups: Groups | None = None, *, seed: int = 0, samples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of per-example values (N,).

    With `groups` (N,), whole groups are drawn (the captions of a picture, the examples of a statement), and the mean is
    over the examples of those drawn. The same seed gives the same interval, in whatever order the examples are.
    DataError if there is no value, or not one group for each.
    """
    numbers = _numbers(values)
    return _interval(_units([numbers], [np.arange(len(numbers)) if groups is None else groups]), seed, samples, level)


def bootstrap_sum(
    values: Sequence[ArrayLike],
    groups: Sequence[Groups],
    *,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval (low, high) of the sum of the means of M metrics on the same groups, drawn for all at once.

    Each metric may have values of its own (pictures, captions); its groups (N,) tell which of them belong together.
    DataError if a metric has no value, or not one group for each.
    """
    return _interval(_units([_numbers(v) for v in values], groups), seed, samples, level)


def _interval(units: _Units, seed: int, samples: int, level: float) -> tuple[float, float]:
    shares = units.counts / units.counts.sum()
    rng = np.random.default_rng(seed)
    sums = []
    for rows in _chunks(samples, len(shares)):
        drawn = rng.multinomial(units.counts.sum(), shares, size=rows)
        sums.append(((drawn @ units.sums) / (drawn @ units.sizes)).sum(axis=1))
    low, high = np.quantile(np.concatenate(sums), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def paired_test(
    a: ArrayLike,
    b: ArrayLike,
    groups: Groups | None = None,
    *,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
) -> Comparison:
    """Compare two models by their values (N,) on the same examples, in the same order.

    The p-value is of the sign-flip permutation test: (1 + flips at least as far from 0) / (1 + samples); groups are
    flipped as a whole. DataError if there is no value, or not one of b and of `groups` for each of a.
    """
    first, second = _numbers(a), _numbers(b)
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} examples can't be paired: evaluate both on the same ones")
    difference = first - second
    interval = bootstrap(difference, groups, seed=seed, samples=samples, level=level)
    flipped = _units([difference], [np.arange(len(difference)) if groups is None else groups])
    p_value = _sign_flip(flipped, seed, samples)
    return Comparison(float(difference.mean()), interval, p_value)


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise DataError(f"an interval needs one value for each example (N,), not values of shape {numbers.shape}")
    return numbers


def _units(values: Sequence[NDArray[np.float64]], groups: Sequence[Groups]) -> _Units:
    for own, names in zip(values, groups, strict=True):
        if len(names) != len(own):
            raise DataError(f"{len(own)} values but {len(names)} groups: give one for each")
    names_G, number_N = np.unique(np.concatenate([np.asarray(names) for names in groups]), return_inverse=True)
    numbers = np.split(number_N, np.cumsum([len(own) for own in values])[:-1])
    sums = [_totals(own, n, len(names_G)) for own, n in zip(values, numbers, strict=True)]
    sizes = [_totals(np.ones_like(own), n, len(names_G)) for own, n in zip(values, numbers, strict=True)]
    # Rounded, so that 0.9 - 0.6 and 0.3 are one value.
    rows, counts = np.unique(np.stack((*np.round(sums, 12), *sizes), axis=1), axis=0, return_counts=True)
    return _Units(rows[:, : len(values)], rows[:, len(values) :], counts)


def _totals(values: NDArray[np.float64], group_N: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    return np.bincount(group_N, weights=values, minlength=groups).astype(np.float64)


def _sign_flip(units: _Units, seed: int, samples: int) -> float:
    rng = np.random.default_rng(seed)
    sums = units.sums[:, 0]
    observed = abs(float(units.counts @ sums))
    # Sums that differ by rounding only are equally far.
    as_far = observed - 1e-9 * float(units.counts @ np.abs(sums))
    further = 0
    for rows in _chunks(samples, len(units.counts)):
        positive = rng.binomial(units.counts, 0.5, size=(rows, len(units.counts)))
        further += int((np.abs((2 * positive - units.counts) @ sums) >= as_far).sum())
    return (1 + further) / (1 + samples)


def _chunks(samples: int, width: int) -> Iterator[int]:
    """Numbers of samples that add up to `samples`, each with at most CHUNK counts where `width` allows it."""
    step = max(1, CHUNK // width)
    for start in range(0, samples, step):
        yield min(step, samples - start)
