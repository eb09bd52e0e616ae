"""From an example to a sample: decode and crop the picture, tokenize the text, draw the masks."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vlmoe_core.data.config import DataConfig, StreamName
from vlmoe_core.data.example import Example, Sample, TextEncoder
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.data.joining import joined
from vlmoe_core.errors import DataError

Target = Callable[[Example], NDArray[np.generic] | None]
"""What a task must predict of an example; null: not known. Raises DataError, without a name, for what it can't be."""


class Corruption(Protocol):
    """What hides tokens and patches; the objective supplies it."""

    def text(self, ids: list[int], stream: StreamName, rng: random.Random) -> tuple[list[int], list[int]]:
        """(corrupted ids, targets: the original id where it must be predicted, -1 elsewhere)."""
        ...

    def image(self, stream: StreamName, rng: random.Random) -> NDArray[np.bool_]:
        """(patches,), True where the patch is hidden."""
        ...


@dataclass(frozen=True)
class NothingHidden:
    """The corruption of a task: everything is seen."""

    num_patches: int
    """Patches of an image."""

    def text(self, ids: list[int], stream: StreamName, rng: random.Random) -> tuple[list[int], list[int]]:
        """The ids as they are, nothing to predict."""
        return ids, [-1] * len(ids)

    def image(self, stream: StreamName, rng: random.Random) -> NDArray[np.bool_]:
        """No patch."""
        return np.zeros(self.num_patches, dtype=np.bool_)


@dataclass(frozen=True)
class Preparer:
    """Makes samples of one split."""

    transforms: Mapping[StreamName, ImageTransform]
    """Decoding and cropping of each stream with images."""
    max_text: Mapping[StreamName, int]
    """Longest text of each stream with texts, [CLS] and [SEP] included."""
    text_encoder: TextEncoder
    """The text tokenizer."""
    corruption: Corruption
    """What hides tokens and patches."""
    pad_text_to: int | None = None
    """Length up to which [PAD] tokens are appended."""
    target: Target | None = None
    """What a task must predict; null in pretraining."""

    def __call__(self, stream: StreamName, position: int, example: Example, rng: random.Random) -> Sample:
        """The sample of an example. Raises DataError, naming the example, if it is broken."""
        pixels = mask = ids = targets = second_at = None
        more: tuple[NDArray[np.uint8], ...] = ()
        if stream != "text":
            transform = self.transforms[stream]
            pixels = read_pixels(stream, example, transform, rng)
            more = tuple(_decode(example, image, transform, rng) for image in example.more_images)
            mask = self.corruption.image(stream, rng)
        if stream != "image":
            words, second_at = self._words(stream, example)
            ids, targets = self._text(stream, words, rng)
        target = self._target(example)
        return Sample(example.name, position, example.image_id, pixels, mask, ids, targets, second_at, more, target)

    def _text(
        self, stream: StreamName, words: list[int], rng: random.Random
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        encoder = self.text_encoder
        ids, targets = self.corruption.text([encoder.cls_id, *words, encoder.sep_id], stream, rng)
        missing = max(0, (self.pad_text_to or 0) - len(ids))
        ids, targets = ids + [encoder.pad_id] * missing, targets + [-1] * missing
        return np.array(ids, dtype=np.int64), np.array(targets, dtype=np.int64)

    def _words(self, stream: StreamName, example: Example) -> tuple[list[int], int | None]:
        """Token ids between [CLS] and the last [SEP]: one text, or two with a [SEP] between them, cut to fit.

        And where the second text begins, counted from [CLS]; null: there is none.
        """
        encoder, room = self.text_encoder, self.max_text[stream] - 2
        if example.text_ids is not None:
            return _known_ids(example, encoder.vocab_size)[:room], None
        if not example.text:
            raise DataError(f"{example.name}: has no text, which the {stream} stream needs")
        first = encoder.encode(example.text)
        if example.second_text is None:
            return first[:room], None
        return joined(first, encoder.encode(example.second_text), room, encoder.sep_id)

    def _target(self, example: Example) -> NDArray[np.generic] | None:
        if self.target is None:
            return None
        try:
            return self.target(example)
        except DataError as error:
            raise DataError(f"{example.name}: {error}") from error


def _known_ids(example: Example, vocab_size: int) -> list[int]:
    ids = list(example.text_ids or ())
    unknown = next((i for i in ids if not 0 <= i < vocab_size), None)
    if unknown is not None:
        raise DataError(
            f"{example.name}: token id {unknown} is not in the text tokenizer's 0..{vocab_size - 1}; load the "
            "tokenizer that wrote the file (tokenizers.text.load)"
        )
    return ids


def read_pixels(
    stream: StreamName, example: Example, transform: ImageTransform, rng: random.Random
) -> NDArray[np.uint8]:
    """(3, height, width) of the picture. Raises DataError, naming the example, if there is none or it is broken."""
    if example.image is None:
        raise DataError(f"{example.name}: has no image, which the {stream} stream needs")
    return _decode(example, example.image, transform, rng)


def _decode(example: Example, image: bytes | Image, transform: ImageTransform, rng: random.Random) -> NDArray[np.uint8]:
    try:
        return transform(image, rng)
    except DataError as error:
        raise DataError(f"{example.name}: {error}") from error


def build_preparer(
    data: DataConfig,
    image_size: int,
    text_encoder: TextEncoder,
    corruption: Corruption,
    training: bool,
    target: Target | None = None,
) -> Preparer:
    """The preparer of training data (augmented) or of held-out data (whole images)."""
    augments = {"image": data.augment.image, "pair": data.augment.pair}
    transforms = {
        stream: ImageTransform(image_size, augment if training else None, data.max_pixels)
        for stream, augment in augments.items()
    }
    max_text = {"text": data.max_text.text, "pair": data.max_text.pair}
    return Preparer(transforms, max_text, text_encoder, corruption, data.pad_text_to, target)  # type: ignore[arg-type]
