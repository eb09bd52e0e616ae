"""A micro-batch of one stream.

Axis letters: I images, P patches, T text tokens, S sequences, X examples, C channels, H height, W width.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A list of sequences, each of at most one image and at most one text. No padding.

    Images stand in the order of their sequences, and so do the tokens of the texts.
    """

    fused: bool
    """True: every sequence holds an image and a text (the pair stream); False: every sequence holds one of the two."""
    pixels_ICHW: Tensor
    """uint8 RGB."""
    patch_mask_IP: Tensor
    """bool, True where the patch is hidden and must be predicted."""
    image_ids: Tensor
    """(I,) int64, number of the picture in its source; captions of one picture share it."""
    sequence_of_image: Tensor
    """(I,) int64, the sequence that the image belongs to."""
    text_ids_T: Tensor
    """int64 token ids, [CLS] and [SEP] included, already corrupted."""
    text_targets_T: Tensor
    """int64, the original id where it must be predicted, -1 elsewhere."""
    text_positions_T: Tensor
    """int64 position of the token in its text, from 0."""
    sequence_of_text: Tensor
    """(T,) int64, the sequence that the text token belongs to."""
    example_of_sequence: Tensor
    """(S,) int64, the example that the sequence belongs to."""
    positions: Tensor
    """(X,) int64, position of the example in its stream."""
    longest_text: int
    """Tokens of the longest text. This count and the next two are known to the host: no device is waited for."""
    num_masked_patches: int
    """Patches that must be predicted."""
    num_masked_words: int
    """Text tokens that must be predicted."""
    targets: Tensor | None = None
    """(X, ...) what a task must predict of each example; null in pretraining and where nothing is known."""
    second_text_T: Tensor | None = None
    """bool, True for the tokens of the second of two texts, its [SEP] included; null: no sequence has two."""
    codes_IP: Tensor | None = None
    """int64 visual codes of the patches, where they were stored; null: whoever needs them encodes the pixels."""
    only: Literal["vision", "text"] | None = None
    """The modality of the stream, though no example be there; null: both, or whatever the examples are of."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.example_of_sequence.shape[0]

    @property
    def num_images(self) -> int:
        """I."""
        return self.pixels_ICHW.shape[0]

    @property
    def num_examples(self) -> int:
        """X."""
        return self.positions.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)
