"""What stands in for data in a trial: random examples where none may be read, documents that are not packed yet."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from PIL import Image

from vlmoe_core.data.config import STREAMS, SourceConfig, StreamName
from vlmoe_core.data.example import Example, Source
from vlmoe_core.data.stream import Stream
from vlmoe_core.errors import DataError
from vlmoe_core.recipe.config import Recipe

NUM_SPECIALS = 5
NOISE_EXAMPLES = 64
FIRST_DOCUMENTS = 64


class NumberEncoder:
    """A text encoder whose words are the ids themselves, written as numbers: `17 4 921`."""

    pad_id, unk_id, cls_id, sep_id, mask_id = range(NUM_SPECIALS)
    fingerprint = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids that the text names."""
        return [int(word) for word in text.split()]


class NoiseSource:
    """Random pixels and random words, as long as the recipe allows."""

    def __init__(self, recipe: Recipe, stream: StreamName) -> None:
        self._stream = stream
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
        return Example(f"noise/{index}", image, text, index)

    def texts(self) -> Iterator[str]:
        """All texts."""
        return (self[index].text or "" for index in range(0 if self._stream == "image" else NOISE_EXAMPLES))


def noise_streams(recipe: Recipe) -> Mapping[StreamName, Stream]:
    """A stream of random examples for each stream that the recipe trains on."""
    entry = (SourceConfig(source="noise"),)
    trained = [stream for stream in STREAMS if getattr(recipe.data.train, stream)]
    return {name: Stream(name, entry, (NoiseSource(recipe, name),), recipe.seed) for name in trained}


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
