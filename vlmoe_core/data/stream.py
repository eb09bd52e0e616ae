"""A stream: the examples of one kind, mixed from weighted sources, by position."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmoe_core.config import plugin_module
from vlmoe_core.data.config import STREAMS, DataConfig, SourceConfig, SplitConfig, StreamName
from vlmoe_core.data.example import Example, Source, SourceContext, TextEncoder
from vlmoe_core.data.order import Mixture, SourceOrder, derive_key
from vlmoe_core.errors import DataError

SOURCE_SHIFT = 40
"""A picture's number in the stream is its number in its source, plus its source's number shifted by so many bits."""


@dataclass(frozen=True)
class Stream:
    """Examples by position: a pure function of (seed, stream, position)."""

    name: StreamName
    """image, text or pair."""
    configs: tuple[SourceConfig, ...]
    """The recipe's entries, one for each source."""
    sources: tuple[Source, ...]
    """The opened sources."""
    seed: int
    """The recipe's seed, or 0 for held-out data."""
    mixture: Mixture = field(init=False)
    orders: tuple[SourceOrder, ...] = field(init=False)

    def __post_init__(self) -> None:
        key = derive_key(self.seed, self.name)
        orders = tuple(
            SourceOrder(config, source.blocks, derive_key(key, number))
            for number, (config, source) in enumerate(zip(self.configs, self.sources, strict=True))
        )
        object.__setattr__(self, "mixture", Mixture([c.weight for c in self.configs]))
        object.__setattr__(self, "orders", orders)

    def __getitem__(self, position: int) -> Example:
        """The example at a position. Raises DataError if it is broken."""
        source, number = self.mixture(position)
        return _from_source(source, self.sources[source][self.orders[source](number)])

    def random(self, position: int) -> random.Random:
        """The generator from which masks and augmentations of a position draw."""
        return random.Random(derive_key(self.seed, self.name, position))

    @property
    def epoch(self) -> int:
        """Positions until the first example of any source comes again."""
        return min(self.mixture.position_of(number, order.size) for number, order in enumerate(self.orders))


@dataclass(frozen=True)
class WholeStream:
    """Every example of a stream's sources once, in stored order: what a model is scored on."""

    name: StreamName
    """image, text or pair."""
    sources: tuple[Source, ...]
    """The opened sources."""

    def __getitem__(self, position: int) -> Example:
        """The example at a position. Raises DataError if it is broken."""
        index = position
        for number, source in enumerate(self.sources):
            if index < len(source):
                return _from_source(number, source[index])
            index -= len(source)
        raise IndexError(f"position {position} behind the last of {self.epoch}")

    def random(self, position: int) -> random.Random:
        """A generator for a position; nothing that is scored draws from it."""
        return random.Random(position)

    @property
    def epoch(self) -> int:
        """All examples."""
        return sum(map(len, self.sources))


def _from_source(number: int, example: Example) -> Example:
    """The example, its picture numbered apart from those of the stream's other sources."""
    if number == 0 or example.image_id < 0:
        return example
    return replace(example, image_id=(number << SOURCE_SHIFT) + example.image_id)


def open_streams(
    data: DataConfig, split: SplitConfig, seed: int, text_encoder: TextEncoder | None = None
) -> Mapping[StreamName, Stream]:
    """Open every source of a split. Raises DataError for a source that is missing or empty."""
    return {name: _open_stream(name, data, split, seed, text_encoder) for name in STREAMS if getattr(split, name)}


def _open_stream(
    name: StreamName, data: DataConfig, split: SplitConfig, seed: int, text_encoder: TextEncoder | None
) -> Stream:
    configs: tuple[SourceConfig, ...] = getattr(split, name)
    max_text = 0 if name == "image" else getattr(data.max_text, name)
    context = SourceContext(name, Path(data.root), max_text, text_encoder)
    return Stream(name, configs, tuple(_open_source(config, context) for config in configs), seed)


def _open_source(config: SourceConfig, context: SourceContext) -> Source:
    module = plugin_module("vlmoe_core.data.sources", config.source)
    source: Source = module.open_source(config, context)
    if context.text_encoder is not None and len(source) == 0:
        described = config.model_dump(exclude_defaults=True)
        raise DataError(f"the source {described} holds no example of the {context.stream} stream")
    return source
