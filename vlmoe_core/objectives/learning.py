"""What an objective learns beside gradients: once before the first step, and from sums after each step."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName


@runtime_checkable
class Learns(Protocol):
    """An objective with a state that no optimiser moves. Its losses bring `statistics`, sums over a micro-batch."""

    @property
    def starts_at(self) -> int:
        """Before which 0-based step it is started."""
        ...

    def start(self, batches: Iterable[Mapping[StreamName, Batch]]) -> None:
        """Set the state from the first micro-batches of the training data, as many as it asks for.

        A state that came with the weights of another model stays.
        """
        ...

    def learn(self, sums: Mapping[str, Tensor], step: int) -> None:
        """Move the state by the statistics of a 0-based step, summed over its micro-batches and ranks."""
        ...

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """What the statistics of an evaluation say, for its line of metrics."""
        ...
