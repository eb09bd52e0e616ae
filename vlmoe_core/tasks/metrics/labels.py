"""Whether labels are right: classification (top-1, top-5), inference, statements."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def hits(predictions: Sequence[Sequence[str]], truth: Sequence[str], k: int = 1) -> NDArray[np.float64]:
    """Per example (N,): 1 if the truth is among the first k of its predicted labels, best first, else 0."""
    found = [label in ranked[:k] for ranked, label in zip(predictions, truth, strict=True)]
    return np.array(found, dtype=np.float64)
