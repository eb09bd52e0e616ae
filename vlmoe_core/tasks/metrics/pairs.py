"""Consistency of NLVR2 and NLVR: the share of statements that are judged rightly wherever they occur.

By the rules of the official scorers (lil-lab/nlvr). Accuracy is the plain mean.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.errors import DataError


def statement_of(identifier: str) -> str:
    """What the identifiers of one statement share: `split-set-sentence` for NLVR2, the sentence for NLVR.

    NLVR2 writes split-set-pair-sentence, NLVR writes sentence-number; DataError for anything else.
    """
    parts = identifier.split("-")
    if len(parts) not in (2, 4) or not all(parts):
        raise DataError(
            f"'{identifier}' is no identifier of NLVR2 (split-set-pair-sentence, as dev-850-0-1) or NLVR (as 1572-0)"
        )
    return parts[0] if len(parts) == 2 else "-".join((parts[0], parts[1], parts[3]))


def consistent(ids: Sequence[str], correct: Sequence[bool]) -> NDArray[np.float64]:
    """Per statement (S,), in order of first appearance: 1 if every example of it is correct, else 0."""
    groups: dict[str, bool] = {}
    for identifier, right in zip(ids, correct, strict=True):
        statement = statement_of(identifier)
        groups[statement] = groups.get(statement, True) and bool(right)
    return np.array(list(groups.values()), dtype=np.float64)


def consistency(ids: Sequence[str], correct: Sequence[bool]) -> float:
    """Share of the statements (0..1) with all examples correct; DataError if there is none."""
    if not ids:
        raise DataError("consistency needs at least one example")
    return float(consistent(ids, correct).mean())
