"""Bytes that the experts' operator takes for itself while it runs.

Shapes: N rows sorted by expert, D width, H hidden width, E experts, K choices of a token.
"""

from typing import Any, NamedTuple

from vlmoe_core.moe.native import ALIGNMENT

EXPERTS, EXPERTS_BACKWARD = "vlmoe::expert_ffn", "vlmoe::expert_ffn_backward"


class _Sizes(NamedTuple):
    """Of a call of the experts' operator."""

    rows: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    element: int
    """Bytes of a number."""


def expert_scratch(native: bool, func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that the experts' operator takes for itself: torch's grouped kernel (`native`, if the widths allow it), or
    one product an expert.

    Read from vlmoe_core/moe/native.py and by_expert.py.
    """
    if func.name() not in (EXPERTS, EXPERTS_BACKWARD):
        return 0
    x_TD, weight_TK, choice_N, _, up_EHD = args[:5]
    experts, hidden, dim = up_EHD.shape
    sizes = _Sizes(choice_N.shape[0], dim, hidden, experts, weight_TK.shape[1], x_TD.element_size())
    aligned = all(width * sizes.element % ALIGNMENT == 0 for width in (dim, hidden))
    numbers = _grouped if native and aligned else _by_expert
    return numbers(sizes, func.name() == EXPERTS_BACKWARD) * sizes.element


def _grouped(sizes: _Sizes, backward: bool) -> int:
    """Numbers that torch's grouped kernel and what surrounds it take."""
    return sizes.rows * (sizes.dim + (2 if backward else 1) * sizes.hidden)


def _by_expert(sizes: _Sizes, backward: bool) -> int:
    """Numbers of one product an expert: what all of them write, and what one of them holds."""
    whole = sizes.rows * sizes.dim * ((sizes.top_k > 1) + backward)
    return whole + -(-sizes.rows // sizes.experts) * (sizes.dim + sizes.hidden) * (1 + backward)
