"""From an example to a sample: decode and crop the picture, tokenize the text, draw the masks."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.data.config import DataConfig, StreamName
from vlmoe_core.data.example import Example, Sample, TextEncoder
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.errors import DataError


class Corruption(Protocol):
    """What hides tokens and patches; the objective supplies it."""

    def text(self, ids: list[int], stream: StreamName, rng: random.Random) -> tuple[list[int], list[int]]:
        """(corrupted ids, targets: the original id where it must be predicted, -1 elsewhere)."""
        ...

    def image(self, stream: StreamName, rng: random.Random) -> NDArray[np.bool_]:
        """(patches,), True where the patch is hidden."""
        ...


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

    def __call__(self, stream: StreamName, position: int, example: Example, rng: random.Random) -> Sample:
        """The sample of an example. Raises DataError, naming the example, if it is broken."""
        pixels = mask = ids = targets = None
        if stream != "text":
            pixels = read_pixels(stream, example, self.transforms[stream], rng)
            mask = self.corruption.image(stream, rng)
        if stream != "image":
            ids, targets = self._text(stream, example, rng)
        return Sample(example.name, position, example.image_id, pixels, mask, ids, targets)

    def _text(
        self, stream: StreamName, example: Example, rng: random.Random
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if not example.text:
            raise DataError(f"{example.name}: has no text, which the {stream} stream needs")
        encoder = self.text_encoder
        words = encoder.encode(example.text)[: self.max_text[stream] - 2]
        ids, targets = self.corruption.text([encoder.cls_id, *words, encoder.sep_id], stream, rng)
        missing = max(0, (self.pad_text_to or 0) - len(ids))
        ids, targets = ids + [encoder.pad_id] * missing, targets + [-1] * missing
        return np.array(ids, dtype=np.int64), np.array(targets, dtype=np.int64)


def read_pixels(
    stream: StreamName, example: Example, transform: ImageTransform, rng: random.Random
) -> NDArray[np.uint8]:
    """(3, height, width) of the picture. Raises DataError, naming the example, if there is none or it is broken."""
    if example.image is None:
        raise DataError(f"{example.name}: has no image, which the {stream} stream needs")
    try:
        return transform(example.image, rng)
    except DataError as error:
        raise DataError(f"{example.name}: {error}") from error


def build_preparer(
    data: DataConfig, image_size: int, text_encoder: TextEncoder, corruption: Corruption, training: bool
) -> Preparer:
    """The preparer of training data (augmented) or of held-out data (whole images)."""
    augments = {"image": data.augment.image, "pair": data.augment.pair}
    transforms = {
        stream: ImageTransform(image_size, augment if training else None, data.max_pixels)
        for stream, augment in augments.items()
    }
    max_text = {"text": data.max_text.text, "pair": data.max_text.pair}
    return Preparer(transforms, max_text, text_encoder, corruption, data.pad_text_to)  # type: ignore[arg-type]
