"""What the examples of a source are like: how many, which are broken, how long the texts, how large the pictures."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.decoding import open_picture
from vlmoe_core.data.example import Example
from vlmoe_core.data.prepare import Preparer
from vlmoe_core.data.stream import Stream
from vlmoe_core.errors import DataError

UNTOLD = ("source", "weight", "order", "window")
MOST_PATHS = 2
SPECIAL_TOKENS = 2


@dataclass(frozen=True)
class TextLengths:
    """Lengths of the texts of a source in tokens, [CLS] and [SEP] included, before they are cut."""

    minimum: int
    """The shortest."""
    median: int
    """As many are shorter as are longer."""
    percentile_95: int
    """95 % are not longer."""
    maximum: int
    """The longest."""
    limit: int
    """The recipe's longest text."""
    cut: float
    """Share of the texts that are longer than the limit."""


@dataclass(frozen=True)
class ImageSizes:
    """Width and height of the pictures of a source, in pixels, as they are stored."""

    smallest: tuple[int, int]
    """The one of smallest area."""
    median: tuple[int, int]
    """Median width and median height."""
    largest: tuple[int, int]
    """The one of largest area."""


@dataclass(frozen=True)
class SourceSurvey:
    """What was found in one source."""

    examples: int
    """Examples that it holds."""
    read: int
    """Examples that were read."""
    broken: tuple[str, ...]
    """Of those that were read: the message of each that training can't use."""
    text: TextLengths | None
    """Null where no text could be read."""
    image: ImageSizes | None
    """Null where no picture could be read."""


def describe_source(config: SourceConfig) -> str:
    """The source as a recipe names it, on one line: `tar train-*.tar`, `scenes split=eval`."""
    fields = config.model_dump(mode="json", exclude_unset=True, exclude=set(UNTOLD))
    path = fields.pop("path", None) or fields.pop("hub", None) or ()
    paths = [path] if isinstance(path, str) else list(path)
    if len(paths) > MOST_PATHS:
        paths[1:] = [f"and {len(paths) - 1} more"]
    return " ".join([config.source, *paths, *(f"{name}={value}" for name, value in fields.items())])


def survey_source(stream: Stream, number: int, preparer: Preparer, limit: int | None) -> SourceSurvey:
    """Read the examples of one source, and make each ready as training does, to see which can't be used.

    Args:
        stream: the stream; opened with the tokenizer of `preparer`.
        number: which of its sources.
        preparer: decodes, crops, tokenizes.
        limit: most examples to read, spread evenly over the source; None: all.
    """
    source = stream.sources[number]
    indices = spread(len(source), limit)
    broken: list[str] = []
    lengths: list[int] = []
    sizes: list[tuple[int, int]] = []
    for index in indices:
        try:
            example = source[index]
            preparer(stream.name, index, example, random.Random(index))
        except DataError as error:
            broken.append(str(error))
            continue
        if stream.name != "image":
            lengths.append(len(preparer.text_encoder.encode(example.text or "")) + SPECIAL_TOKENS)
        if stream.name != "text":
            sizes.append(_size(example, preparer.transforms[stream.name].max_pixels))
    text = _text_lengths(lengths, preparer.max_text[stream.name]) if lengths else None
    return SourceSurvey(len(source), len(indices), tuple(broken), text, _image_sizes(sizes) if sizes else None)


def spread(count: int, limit: int | None) -> Sequence[int]:
    """At most `limit` of the numbers 0 to count - 1, evenly spaced, ascending."""
    if limit is None or limit >= count:
        return range(count)
    return [i * count // limit for i in range(limit)]


def _size(example: Example, max_pixels: int) -> tuple[int, int]:
    """Width and height; reads the header alone."""
    picture = example.image
    assert picture is not None
    return (open_picture(picture, max_pixels) if isinstance(picture, bytes) else picture).size


def _text_lengths(lengths: Sequence[int], limit: int) -> TextLengths:
    low, middle, high, top = (int(v) for v in np.percentile(lengths, [0, 50, 95, 100], method="inverted_cdf"))
    return TextLengths(low, middle, high, top, limit, sum(length > limit for length in lengths) / len(lengths))


def _image_sizes(sizes: Sequence[tuple[int, int]]) -> ImageSizes:
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    widths, heights = zip(*sizes, strict=True)
    return ImageSizes(by_area[0], (statistics.median_high(widths), statistics.median_high(heights)), by_area[-1])
