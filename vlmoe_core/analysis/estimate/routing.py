"""How many tokens an expert gets."""

from collections import Counter
from dataclasses import dataclass

from vlmoe_core.data.config import StreamName
from vlmoe_core.objectives.loss import Loss


@dataclass(frozen=True)
class Group:
    """The routing groups of one kind of input in one pool of experts: one a micro-batch and sparse layer."""

    stream: StreamName
    """Which inputs: images alone, texts alone, or pairs."""
    pool: str
    """Whose experts: vision, text or shared."""
    layers: int
    """Sparse layers that these inputs pass, each with experts of its own."""
    experts: int
    """Experts of a layer."""
    tokens: int
    """Tokens of a group."""
    choices: int
    """Choices of a group: tokens times top_k."""
    capacity: int | None
    """Places of an expert in training; null: dropless."""
    groups: int
    """Groups in a step, which is its number of micro-batches."""

    @property
    def mean(self) -> float:
        """Choices of a group that fall on an expert, were all alike."""
        return self.choices / self.experts

    @property
    def places(self) -> int | None:
        """Places of all experts of a layer; null: dropless."""
        return None if self.capacity is None else self.capacity * self.experts

    @property
    def effective_batch(self) -> float:
        """Tokens that an expert learns from in a step, from this kind of input, were all alike and none dropped."""
        return self.mean * self.groups


def groups_of(loss: Loss, num_micro: int) -> tuple[Group, ...]:
    """The groups of a micro-batch, from the plans that it was routed by."""
    found: Counter[tuple[StreamName, str, int, int, int, int | None]] = Counter()
    for stream, routed in loss.routed:
        plan = routed.plan
        tokens, choices = plan.expert_TK.shape[0], plan.expert_TK.numel()
        if tokens == 0:  # a stream that the run does not have
            continue
        found[(stream, routed.pool, plan.num_experts, tokens, choices, plan.capacity)] += 1
    return tuple(
        Group(stream, pool, layers, experts, tokens, choices, capacity, num_micro)
        for (stream, pool, experts, tokens, choices, capacity), layers in found.items()
    )
