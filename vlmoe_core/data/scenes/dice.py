"""Random choices that stay the same on every Python: all stand on `Random.random`, which Python promises to keep."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Draws from a stream of random numbers that its name alone decides."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name)

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1."""
        return int(self._random.random() * bound)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self._random.random() < probability

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def mostly(self, items: Sequence[T], probability: float = 0.7) -> T:
        """The first item with that probability, else one of all."""
        return items[0] if self.chance(probability) else self.choice(items)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order (Fisher-Yates)."""
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.below(last + 1)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed
