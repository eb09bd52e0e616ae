"""A loss as named sums, each with its own count and weight, so that any cut into micro-batches gives the same total."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlmoe_core.data.config import StreamName
from vlmoe_core.model.block import Routed


@dataclass(frozen=True)
class Part:
    """One term of the loss: weight x sum / count, the count taken over the whole global batch."""

    sum: Tensor
    """Scalar sum over this micro-batch, float32 (float64 for a float64 model)."""
    count: int
    """Terms in the sum: predicted tokens, or routing groups."""
    weight: float
    """Weight in the total."""
    streams: tuple[StreamName, ...]
    """The streams whose examples it is computed from."""


def added(parts: Mapping[str, Part], more: Mapping[str, Part]) -> dict[str, Part]:
    """The parts of two losses; of those that both have, sums and counts are added."""
    both = {
        name: replace(parts[name], sum=parts[name].sum + part.sum, count=parts[name].count + part.count)
        for name, part in more.items()
        if name in parts
    }
    return {**parts, **more, **both}


@dataclass(frozen=True)
class Loss:
    """What an objective returns for one micro-batch."""

    parts: Mapping[str, Part]
    """The terms by name: mlm, mim, vlm_text, vlm_image, balance/<modality>/<layer>."""
    routed: tuple[tuple[StreamName, Routed], ...] = ()
    """The plans that computed the outputs, with their stream."""
    outputs: Tensor | None = None
    """(X, F) what a task's head says of each example, without graph; null in pretraining."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums over this micro-batch, without graph, from which the objective learns after the step (`Learns`)."""

    def total(self, counts: Mapping[str, float]) -> Tensor:
        """This micro-batch's share of the loss of the global batch.

        Args:
            counts: of each part over all ranks and micro-batches of the step; a part with count 0 contributes 0.
        """
        terms = [part.weight * part.sum / max(1.0, counts[name]) for name, part in self.parts.items()]
        return torch.stack(terms).sum()

    def detached(self) -> "Loss":
        """The sums alone, without graph and plans."""
        return Loss({name: replace(p, sum=p.sum.detach()) for name, p in self.parts.items()})
