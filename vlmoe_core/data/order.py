"""Which example stands at a position: pure functions of (key, position), with O(1) memory.

Nothing here depends on file formats, workers, ranks or accumulation, so neither does the order of examples.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import accumulate

from vlmoe_core.data.config import SourceConfig
from vlmoe_core.decimals import exact

ROUNDS = 6
LONGEST_PERIOD = 10_000
MASK64 = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """A 64-bit key from any printable parts, the same in every process."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of range(size): a Feistel network over the next even number of bits, with cycle walking."""

    size: int
    key: int

    def __call__(self, index: int) -> int:
        """Where `index` goes. Raises IndexError outside range(size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside the permutation of {self.size}")
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        value = _feistel(index, half, self.key)
        while value >= self.size:
            value = _feistel(value, half, self.key)
        return value


def _feistel(value: int, half: int, key: int) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right + key + number * 0x9E3779B97F4A7C15) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    value &= MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK64
    return value ^ value >> 31


class Mixture:
    """Deals the positions of a stream out to its sources in the proportion of their weights.

    Positions are cut into periods, in each of which source i gets exactly `counts[i]` places: each place goes to the
    source whose places lag its share most, so that no source is ever ahead of its share by a whole place. The numbers
    within a source rise with the position.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = period_counts([exact(w) for w in weights])
        self.period = sum(self.counts)
        """Positions after which the sources come in the same order again."""
        self.deal = _deal(self.counts)
        """(source, how many of its places came before) of each place of a period."""

    def __call__(self, position: int) -> tuple[int, int]:
        """(source, number within the source) at a position."""
        period, place = divmod(position, self.period)
        source, earlier = self.deal[place]
        return source, period * self.counts[source] + earlier

    def position_of(self, source: int, number: int) -> int:
        """The position of the number-th example of a source."""
        period, earlier = divmod(number, self.counts[source])
        return period * self.period + self.deal.index((source, earlier))


def _deal(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The sources of one period in order, each with the number of its earlier places."""
    given = [0] * len(counts)
    period = sum(counts)
    deal = []
    for place in range(period):
        source = max(range(len(counts)), key=lambda i: (place + 1) * counts[i] - given[i] * period)
        deal.append((source, given[source]))
        given[source] += 1
    return deal


def period_counts(weights: Sequence[Fraction]) -> list[int]:
    """Places of each source in the shortest period that fits the weights exactly.

    Where that is longer than LONGEST_PERIOD, the period is LONGEST_PERIOD and places go by largest remainder, at least
    one to each source.
    """
    shares = [w / sum(weights) for w in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    quotas = [share * LONGEST_PERIOD for share in shares]
    counts = [math.floor(q) for q in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: LONGEST_PERIOD - sum(counts)]:
        counts[i] += 1
    return [max(1, count) for count in counts]


class SourceOrder:
    """Which example of one source is its n-th: each epoch holds every example once, in an order of its own."""

    def __init__(self, config: SourceConfig, blocks: Sequence[int], key: int) -> None:
        self.config, self.blocks, self.key = config, tuple(blocks), key
        self.size = sum(blocks)
        self._order: Callable[[int, int], int] = self._random if config.order == "random" else self._blocks

    def __call__(self, number: int) -> int:
        """Index of the example with that number, counted over all epochs."""
        epoch, place = divmod(number, self.size)
        return self._order(epoch, place)

    def _random(self, epoch: int, place: int) -> int:
        return Permutation(self.size, derive_key(self.key, epoch))(place)

    def _blocks(self, epoch: int, place: int) -> int:
        """Shards in a keyed order, one after the other; then a keyed order within each window of that sequence."""
        window, inside = divmod(place, self.config.window)
        first = window * self.config.window
        size = min(self.config.window, self.size - first)
        place = first + Permutation(size, derive_key(self.key, epoch, window))(inside)
        order, ends = _shard_order(self.blocks, derive_key(self.key, epoch, "shards"))
        at = bisect_right(ends, place)
        block = order[at]
        return _starts(self.blocks)[block] + place - (ends[at] - self.blocks[block])


@lru_cache(maxsize=8)
def _shard_order(blocks: tuple[int, ...], key: int) -> tuple[list[int], list[int]]:
    permutation = Permutation(len(blocks), key)
    order = [permutation(i) for i in range(len(blocks))]
    return order, list(accumulate(blocks[i] for i in order))


@cache
def _starts(blocks: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(blocks)]
