"""What flows out of a source, and what a source and its helpers look like."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vlmoe_core.data.config import StreamName


@dataclass(frozen=True)
class Example:
    """One item of a source, not yet decoded, tokenized or masked."""

    name: str
    """Where it stands, for messages: `captions.jsonl:17`, `train-000003.tar:1000268201`."""
    image: bytes | Image | None = None
    """An encoded picture, or one that was drawn."""
    text: str | None = None
    """A caption, or a pack of whole sentences."""
    image_id: int = -1
    """Number of the picture in its source: captions of one picture share it; -1 without a picture."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Ground truth beyond image and text, plain values: the objects of a scene, a label, answers (see tasks/kinds)."""
    more_images: tuple[bytes | Image, ...] = ()
    """The pictures behind the first one, where a text speaks of several (NLVR2)."""
    second_text: str | None = None
    """The other sentence of a pair of sentences: the hypothesis."""
    text_ids: tuple[int, ...] | None = None
    """The text as token ids, without special tokens, where that is how a file stores it; `text` is None then."""

    @property
    def words(self) -> str:
        """What a reader of words sees of the text: where a file stores token ids, each id is a word."""
        return " ".join(map(str, self.text_ids)) if self.text_ids is not None else self.text or ""


@dataclass(frozen=True)
class Sample:
    """One example made ready for a batch: decoded, cropped, tokenized, masked."""

    name: str
    """The example's name."""
    position: int
    """Its position in the stream."""
    image_id: int = -1
    """The example's image_id."""
    pixels: NDArray[np.uint8] | None = None
    """(3, height, width), RGB."""
    patch_mask: NDArray[np.bool_] | None = None
    """(patches,), True where the model must predict the patch."""
    text_ids: NDArray[np.int64] | None = None
    """(length,), [CLS] and [SEP] included, already corrupted."""
    text_targets: NDArray[np.int64] | None = None
    """(length,), the original id where it must be predicted, -1 elsewhere."""
    second_text_at: int | None = None
    """Place of the first token of the second text; null: there is one text."""
    more_pixels: tuple[NDArray[np.uint8], ...] = ()
    """The pictures behind the first one: each makes a sequence of its own with the same text."""
    target: NDArray[np.generic] | None = None
    """What a task must predict of the example."""
    codes: NDArray[np.int64] | None = None
    """(patches,), the visual codes of its picture, where they were stored."""


@dataclass(frozen=True)
class Record:
    """What of an example its scoring needs: all but the pictures."""

    position: int
    """Its position in the stream."""
    name: str
    """Where it stands."""
    image_id: int
    """Number of the picture."""
    words: str
    """Its text, of a pair of sentences the first; token ids as words where a file stores those."""
    second_text: str
    """The second sentence."""
    facts: Mapping[str, Any]
    """Ground truth."""


class TextEncoder(Protocol):
    """What data needs of a text tokenizer."""

    vocab_size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    fingerprint: str
    """Changes whenever any text would be encoded differently: part of the key of index caches."""

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ...


class Source(Protocol):
    """Examples of one stream by number. An image with n captions is n examples of `pair` and one of `image`."""

    blocks: Sequence[int]
    """Sizes of the consecutive runs that are read in sequence best (shards); they sum to the length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with file and reason, if it is broken."""
        ...

    def texts(self) -> Iterator[str]:
        """Every text of the source once, in stored order; needs no tokenizer. Fits tokenizers."""
        ...


@runtime_checkable
class LabelledSource(Source, Protocol):
    """A source whose examples can be finetuned on."""

    def records(self) -> Iterator[Example]:
        """Every example once, in stored order, without its pictures; broken ones are left out.

        Label lists and baselines are made from it.
        """
        ...


@dataclass(frozen=True)
class SourceContext:
    """What a source is opened with beside its config: each plug-in has `open_source(config, context) -> Source`."""

    stream: StreamName
    """Which examples are asked for."""
    root: Path
    """Folder from which relative paths start."""
    max_text: int
    """Longest text in tokens, [CLS] and [SEP] included."""
    text_encoder: TextEncoder | None = None
    """Absent while the tokenizer is being fitted: then only `texts` and images are asked for."""
