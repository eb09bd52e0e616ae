"""What stands in for data in a trial: random examples where none may be read, documents that are not packed yet.

Axis letters: I images, P patches, O features of a teacher, C channels, H height, W width.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from vlmoe_core.data.config import STREAMS, SourceConfig, StreamName
from vlmoe_core.data.example import Example, Source
from vlmoe_core.data.stream import Stream
from vlmoe_core.errors import DataError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS, Labels
from vlmoe_core.tasks.task import open_task

NUM_SPECIALS = 5
NOISE_EXAMPLES = 64
FIRST_DOCUMENTS = 64
MADE_UP_LABELS = 1000
"""Labels of a task whose data decide on them (ImageNet: 1,000)."""


class NumberEncoder:
    """A text encoder whose words are the ids themselves, written as numbers: `17 4 921`."""

    pad_id, unk_id, cls_id, sep_id, mask_id = range(NUM_SPECIALS)
    fingerprint = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids that the text names."""
        return [int(word) for word in text.split()]


class UnreadText(NumberEncoder):
    """A text encoder for whoever wants the images alone: any text is one unknown word."""

    def encode(self, text: str) -> list[int]:
        """The unknown word."""
        return [self.unk_id]


class NoiseTeacher:
    """A teacher whose features are random."""

    def __init__(self, dim: int, num_patches: int) -> None:
        self.dim, self._num_patches = dim, num_patches

    def load(self) -> None:
        """There is nothing to load."""

    def features(self, pixels_ICHW: Tensor) -> Tensor:
        """(I, P, O) of any images."""
        return torch.randn(len(pixels_ICHW), self._num_patches, self.dim, device=pixels_ICHW.device)


class NoiseSource:
    """Random pixels and random words, as long as the recipe allows; in a task with a random truth."""

    def __init__(self, recipe: Recipe, stream: StreamName, labels: Labels) -> None:
        self._stream, self._labels = stream, labels
        self._task = None if recipe.task is None else open_task(recipe.task)
        self._side = recipe.model.image_size
        self._ids = range(NUM_SPECIALS, recipe.tokenizers.text.vocab_size)
        self._words = 0 if stream == "image" else getattr(recipe.data.max_text, stream) - 2
        self.blocks: Sequence[int] = (NOISE_EXAMPLES,)

    def __len__(self) -> int:
        return NOISE_EXAMPLES

    def __getitem__(self, index: int) -> Example:
        """The random example of that number, the same each time."""
        rng = random.Random(index)
        image = text = None
        if self._stream != "text":
            image = Image.frombytes("RGB", (self._side, self._side), rng.randbytes(3 * self._side**2))
        if self._stream != "image":
            text = " ".join(map(str, rng.choices(self._ids, k=self._words)))
        example = Example(f"noise/{index}", image, text, index)
        return example if self._task is None else self._task.stand_in(example, self._labels, rng)

    def texts(self) -> Iterator[str]:
        """All texts."""
        return (self[index].text or "" for index in range(0 if self._stream == "image" else NOISE_EXAMPLES))


def stand_in_labels(recipe: Recipe, number: int = MADE_UP_LABELS) -> Labels:
    """The labels of the recipe's task; so many made-up ones where its data decide on them, none in pretraining."""
    if recipe.task is None:
        return NO_LABELS
    known = open_task(recipe.task).known_labels
    return Labels(tuple(map(str, range(number)))) if known is None else known


def noise_streams(recipe: Recipe, labels: Labels = NO_LABELS) -> Mapping[StreamName, Stream]:
    """A stream of random examples for each stream that the recipe trains on."""
    entry = (SourceConfig(source="noise"),)
    trained = [stream for stream in STREAMS if getattr(recipe.data.train, stream)]
    return {name: Stream(name, entry, (NoiseSource(recipe, name, labels),), recipe.seed) for name in trained}


class FirstDocuments:
    """The first documents of a source whose packs can't be known before its tokenizer is fitted, one an example."""

    def __init__(self, source: Source, config: SourceConfig) -> None:
        self._documents = list(islice(source.texts(), FIRST_DOCUMENTS))
        if not self._documents:
            raise DataError(f"the source {config.model_dump(exclude_defaults=True)} holds no text")
        self.blocks: Sequence[int] = (len(self._documents),)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Example:
        """The document of that number, whole."""
        return Example(f"document {index}", text=self._documents[index])

    def texts(self) -> Iterator[str]:
        """The documents."""
        return iter(self._documents)


def with_first_documents(stream: Stream) -> Stream:
    """The stream, with `FirstDocuments` for each source that has no examples while it was opened without a tokenizer.

    Raises DataError for a source without any text.
    """
    pairs = zip(stream.sources, stream.configs, strict=True)
    return replace(stream, sources=tuple(s if len(s) else FirstDocuments(s, config) for s, config in pairs))
