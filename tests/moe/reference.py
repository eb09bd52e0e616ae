"""The routing of one group written as plain loops: the specification that the fast code is tested against."""

import math
from fractions import Fraction


def brute_force_capacity(tokens: int, experts: int, top_k: int, factor: str | None) -> int | None:
    if factor is None:
        return None
    return max(1, math.ceil(Fraction(top_k * tokens) * Fraction(factor) / experts))


def brute_force_plan(
    probs: list[list[float]], top_k: int, capacity: int | None, priority: str
) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Experts, slots and kept of each token's choices."""
    tokens = range(len(probs))
    chosen = []
    for t in tokens:
        ranked = sorted(range(len(probs[t])), key=lambda e: (-probs[t][e], e))
        chosen.append(ranked[:top_k])
    walk = sorted(tokens, key=lambda t: (-max(probs[t]), t)) if priority == "gate" else list(tokens)
    queue: dict[int, int] = {}
    slots = [[0] * top_k for _ in tokens]
    kept = [[False] * top_k for _ in tokens]
    for k in range(top_k):
        for t in walk:
            expert = chosen[t][k]
            slots[t][k] = queue.get(expert, 0)
            queue[expert] = slots[t][k] + 1
            kept[t][k] = capacity is None or slots[t][k] < capacity
    return chosen, slots, kept
