"""What an objective learns from the sums of a step, beside gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmoe_core.objectives.learning import Learns
from vlmoe_core.train.parallel import all_sum, wide_dtype


class Statistics:
    """Adds up the statistics of a step over its micro-batches and ranks, so that what is learned depends on neither."""

    def __init__(self, objective: nn.Module) -> None:
        self.learner = objective if isinstance(objective, Learns) else None
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, statistics: Mapping[str, Tensor]) -> None:
        """Those of one micro-batch. Waits for no device."""
        for name, value in statistics.items():
            value = value.to(wide_dtype(value.device))
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def update(self, step: int) -> None:
        """Let the objective learn from the sums of all ranks, and begin the next step. All ranks call it."""
        if self.learner is not None:
            self.learner.learn(self.total(), step)

    def figures(self) -> dict[str, float]:
        """What the objective says of the sums of all ranks, and none where it learns nothing. All ranks call it."""
        return {} if self.learner is None else self.learner.figures(self.total())

    def total(self) -> dict[str, Tensor]:
        """The sums over all ranks; begins anew."""
        sums = {name: all_sum(value) for name, value in sorted(self.sums.items())}
        self.forget()
        return sums

    def forget(self) -> None:
        """Begin the next step without an update."""
        self.sums.clear()
