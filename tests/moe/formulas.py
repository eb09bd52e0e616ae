"""The balance losses as the papers print them, over nested lists, token by token and expert by expert."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Rows = list[list[float]]


@dataclass(frozen=True)
class Group:
    """The logits of one routing group."""

    clean: Rows
    """Without noise."""
    noisy: Rows
    """With noise."""
    top_k: int
    sigma: float
    """Standard deviation of the noise."""
    local_threshold: float | None = None
    global_threshold: float | None = None


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    terms = [math.exp(z - largest) for z in logits]
    return [term / sum(terms) for term in terms]


def squared_variation(amounts: list[float]) -> float:
    mean = sum(amounts) / len(amounts)
    variance = sum((a - mean) ** 2 for a in amounts) / len(amounts)
    return variance / mean**2


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def importance(group: Group) -> float:
    gates = [softmax(z) for z in group.clean]
    return squared_variation([sum(g[e] for g in gates) for e in range(len(gates[0]))])


def load(group: Group) -> float:
    loads = [0.0] * len(group.clean[0])
    for clean, noisy in zip(group.clean, group.noisy, strict=True):
        threshold = sorted(noisy, reverse=True)[group.top_k - 1]
        for e, z in enumerate(clean):
            # 1 - Phi((threshold - z) / sigma), the probability that new noise lifts z to the threshold.
            loads[e] += 0.5 * math.erfc((threshold - z) / group.sigma / math.sqrt(2))
    return squared_variation(loads)


def switch(group: Group) -> float:
    experts, tokens = len(group.clean[0]), len(group.clean)
    gates = [softmax(z) for z in group.noisy]
    first = [g.index(max(g)) for g in gates]
    shares = [first.count(e) / tokens for e in range(experts)]
    means = [sum(g[e] for g in gates) / tokens for e in range(experts)]
    return experts * sum(share * mean for share, mean in zip(shares, means, strict=True))


def z(group: Group) -> float:
    return sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in group.clean) / len(group.clean)


def local_entropy(group: Group) -> float:
    mean = sum(entropy(softmax(row)) for row in group.clean) / len(group.clean)
    return mean if group.local_threshold is None else max(0.0, mean - group.local_threshold)


def global_entropy(group: Group) -> float:
    gates = [softmax(row) for row in group.clean]
    mean = [sum(g[e] for g in gates) / len(gates) for e in range(len(gates[0]))]
    if group.global_threshold is None:
        return -entropy(mean)
    return max(0.0, group.global_threshold - entropy(mean))


FORMULAS: Mapping[str, Callable[[Group], float]] = {
    "importance": importance,
    "load": load,
    "switch": switch,
    "z": z,
    "local_entropy": local_entropy,
    "global_entropy": global_entropy,
    "vloss": lambda group: 0.5 * importance(group) + 0.5 * load(group),
}
