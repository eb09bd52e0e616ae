"""Consistency of NLVR2 and NLVR: the share of statements that are judged rightly wherever they occur.

By the rules of the official scorers (lil-lab/nlvr). Accuracy is the plain mean.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def statement_of(identifier: str) -> str | None:
    """What the identifiers of one statement share: `split-set-sentence` for NLVR2, the sentence for NLVR.

    NLVR2 writes split-set-pair-sentence, NLVR writes sentence-number. None for anything else, such as the
    split-set-pair of VLMo's tables.
    """
    parts = identifier.split("-")
    if len(parts) not in (2, 4) or not all(parts):
        return None
    return parts[0] if len(parts) == 2 else "-".join((parts[0], parts[1], parts[3]))


def consistent(statements: Sequence[str], correct: Sequence[bool]) -> NDArray[np.float64]:
    """Per statement (S,), in order of first appearance: 1 if every example of it is correct, else 0."""
    groups: dict[str, bool] = {}
    for statement, right in zip(statements, correct, strict=True):
        groups[statement] = groups.get(statement, True) and bool(right)
    return np.array(list(groups.values()), dtype=np.float64)
