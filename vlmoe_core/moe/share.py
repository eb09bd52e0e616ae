"""Which experts of a layer a process holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Consecutive experts of a layer, out of all that it has."""

    first: int
    """Number of the first one."""
    count: int
    """How many."""
    total: int
    """How many the layer has on all processes together."""

    @property
    def whole(self) -> bool:
        """Whether these are all experts of the layer."""
        return self.count == self.total

    @property
    def numbers(self) -> range:
        """The experts' numbers."""
        return range(self.first, self.first + self.count)


def whole(total: int) -> Share:
    """All experts of a layer."""
    return Share(0, total, total)
