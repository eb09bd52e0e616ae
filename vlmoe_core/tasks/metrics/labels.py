"""Accuracy of labels: classification (top-1, top-5), inference, statements; and means by subset."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmoe_core.errors import DataError


def hits(predictions: Sequence[Sequence[str]], truth: Sequence[str], k: int = 1) -> NDArray[np.float64]:
    """Per example (N,): 1 if the truth is among the first k of its predicted labels, best first, else 0."""
    found = [label in ranked[:k] for ranked, label in zip(predictions, truth, strict=True)]
    return np.array(found, dtype=np.float64)


def accuracy(predictions: Sequence[Sequence[str]], truth: Sequence[str], k: int = 1) -> float:
    """Top-k accuracy (0..1); DataError if there is no example."""
    if not truth:
        raise DataError("accuracy needs at least one example")
    return float(hits(predictions, truth, k).mean())


def mean_by(values: ArrayLike, subsets: Sequence[str]) -> dict[str, float]:
    """Mean of the values (N,) of each subset, subsets in alphabetical order: by answer type, by split, by class."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) != len(subsets):
        raise DataError(f"{len(numbers)} values but {len(subsets)} names of subsets: give one for each")
    names, group_N = np.unique(np.asarray(subsets, dtype=np.str_), return_inverse=True)
    sums = np.bincount(group_N, weights=numbers, minlength=len(names))
    sizes = np.bincount(group_N, minlength=len(names))
    return {str(name): float(mean) for name, mean in zip(names, sums / np.maximum(sizes, 1), strict=True)}
