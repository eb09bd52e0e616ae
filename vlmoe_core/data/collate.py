"""From samples to a batch."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Sample

MODALITY: Mapping[StreamName, Literal["vision", "text"] | None] = {"image": "vision", "text": "text", "pair": None}
"""The modality of a stream that has one alone."""


def collate(stream: StreamName, samples: Sequence[Sample], image_size: int, num_patches: int) -> Batch:
    """The batch of one stream; no sample at all gives an empty batch.

    A sample with several pictures becomes so many sequences, each of one picture and the text.

    Args:
        stream: image, text or pair.
        samples: the samples, in the order of their positions.
        image_size: pixels along an image's side, for the shape of an empty batch.
        num_patches: P, likewise.
    """
    counts = [1 + len(s.more_pixels) for s in samples]
    sequences = [s for s, n in zip(samples, counts, strict=True) for _ in range(n)]
    pixels = [p for s in samples if s.pixels is not None for p in (s.pixels, *s.more_pixels)]
    masks = [s.patch_mask for s in sequences if s.patch_mask is not None]
    texts = [s.text_ids for s in sequences if s.text_ids is not None]
    targets = [s.text_targets for s in sequences if s.text_targets is not None]
    lengths = [len(t) for t in texts]
    return Batch(
        fused=stream == "pair",
        pixels_ICHW=_stack(pixels, (3, image_size, image_size), np.uint8),
        patch_mask_IP=_stack(masks, (num_patches,), np.bool_),
        image_ids=torch.tensor([s.image_id for s in sequences if s.pixels is not None], dtype=torch.int64),
        sequence_of_image=torch.arange(len(pixels)),
        text_ids_T=_concatenate(texts),
        text_targets_T=_concatenate(targets),
        text_positions_T=_concatenate([np.arange(n) for n in lengths]),
        sequence_of_text=_concatenate([np.full(n, i) for i, n in enumerate(lengths)]),
        example_of_sequence=torch.tensor([x for x, n in enumerate(counts) for _ in range(n)], dtype=torch.int64),
        positions=torch.tensor([s.position for s in samples], dtype=torch.int64),
        longest_text=max(lengths, default=0),
        num_masked_patches=int(sum(m.sum() for m in masks)),
        num_masked_words=int(sum((t >= 0).sum() for t in targets)),
        targets=_targets(samples),
        second_text_T=_second_texts(sequences),
        codes_IP=_codes(samples),
        only=MODALITY[stream],
    )


def _second_texts(sequences: Sequence[Sample]) -> torch.Tensor | None:
    if all(s.second_text_at is None for s in sequences):
        return None
    pairs = [(len(s.text_ids), s.second_text_at) for s in sequences if s.text_ids is not None]
    return _concatenate([np.arange(n) >= (n if at is None else at) for n, at in pairs])


def _codes(samples: Sequence[Sample]) -> torch.Tensor | None:
    codes = [s.codes for s in samples if s.codes is not None]
    return torch.from_numpy(np.stack(codes)) if codes else None


def _targets(samples: Sequence[Sample]) -> torch.Tensor | None:
    known = [s.target for s in samples if s.target is not None]
    return torch.from_numpy(np.stack(known)) if known and len(known) == len(samples) else None


def _stack(arrays: list[NDArray], shape: tuple[int, ...], dtype: type[np.generic]) -> torch.Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(np.stack(arrays) if arrays else np.zeros((0, *shape), dtype))


def _concatenate(arrays: list[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, np.int64))
