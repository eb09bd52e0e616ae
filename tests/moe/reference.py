"""The routing of one group written as plain loops: the specification that the fast code is tested against."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise


def brute_force_capacity(tokens: int, experts: int, top_k: int, factor: str | None) -> int | None:
    if factor is None:
        return None
    return max(1, math.ceil(Fraction(top_k * tokens) * Fraction(factor) / experts))


def brute_force_choice(scores: list[list[float]], top_k: int) -> list[list[int]]:
    """The experts of each token, by falling score, the lower number first among equals."""
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in scores]


def brute_force_walk(probs: list[list[float]], priority: str) -> list[int]:
    """The tokens in the order in which they take places."""
    tokens = range(len(probs))
    return sorted(tokens, key=lambda t: (-max(probs[t]), t)) if priority == "gate" else list(tokens)


def brute_force_slots(
    chosen: list[list[int]], walk: Sequence[int], top_k: int, capacity: int | None
) -> tuple[list[list[int]], list[list[bool]]]:
    """Slots and kept of each token's choices: all first choices in the order of the walk, then all second ones."""
    queue: dict[int, int] = {}
    slots = [[0] * top_k for _ in chosen]
    kept = [[False] * top_k for _ in chosen]
    for k in range(top_k):
        for t in walk:
            expert = chosen[t][k]
            slots[t][k] = queue.get(expert, 0)
            queue[expert] = slots[t][k] + 1
            kept[t][k] = capacity is None or slots[t][k] < capacity
    return slots, kept


def brute_force_plan(
    probs: list[list[float]], top_k: int, capacity: int | None, priority: str
) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Experts, slots and kept of each token's choices."""
    chosen = brute_force_choice(probs, top_k)
    return chosen, *brute_force_slots(chosen, brute_force_walk(probs, priority), top_k, capacity)


def walk_that_explains(chosen: list[list[int]], slots: list[list[int]]) -> list[int]:
    """An order of the tokens that agrees with the queues of all experts at every rank of choice.

    Raises AssertionError where there is none.
    """
    before: dict[int, set[int]] = {t: set() for t in range(len(chosen))}
    for k in range(len(chosen[0]) if chosen else 0):
        for expert in {row[k] for row in chosen}:
            queue = sorted((slots[t][k], t) for t, row in enumerate(chosen) if row[k] == expert)
            for (_, first), (_, then) in pairwise(queue):
                before[then].add(first)
    walk: list[int] = []
    while before:
        free = next((t for t, others in before.items() if not others), None)
        assert free is not None, "the experts' queues contradict each other"
        walk.append(free)
        del before[free]
        for others in before.values():
            others.discard(free)
    return walk
