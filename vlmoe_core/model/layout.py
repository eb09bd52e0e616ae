"""Where the tokens of a batch stand.

Outside attention the tokens of a batch are one packed list: all image tokens first, then all text tokens. Attention
needs them by sequence; the layout holds the one index that regroups them, built once a batch and used by every block.

Axis letters: T tokens, D width, S sequences, L places of a sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe_core.data.batch import Batch


@dataclass(frozen=True)
class Layout:
    """Places of the tokens of one batch."""

    num_image_tokens: int
    """Tokens 0 to this belong to images, the others to texts."""
    image_length: int
    """Tokens of one image: [CLS] and its patches."""
    num_sequences: int
    """S."""
    length: int
    """L, places of each sequence: the longest one's tokens."""
    fused: bool
    """Every sequence holds an image and a text."""
    sequence_T: Tensor
    """int64, the sequence of each token."""
    place_T: Tensor
    """int64, sequence * L + place in the sequence."""
    occupied_SL: Tensor
    """bool, True where a token stands."""
    identity_T: Tensor
    """int64, what each token is: the place of an image token in its image, the id of a word."""
    paths: tuple[str, ...] = ("vision", "text")
    """The modalities that the stream may bring and the model has a path for."""

    @property
    def full(self) -> bool:
        """Every place holds a token, so attention needs no mask.

        A graph that is being exported serves texts of any lengths: it has a mask where there are texts.
        """
        if torch.compiler.is_exporting():
            return self.num_image_tokens == self.place_T.shape[0]
        return self.place_T.shape[0] == self.num_sequences * self.length

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have tokens; where none has, all of the stream: an empty batch passes, and touches, what
        the stream's other batches do, as processes that share experts ask for."""
        texts = self.num_image_tokens < self.place_T.shape[0]
        if self.num_image_tokens > 0 and not texts:
            return ("vision",)
        return ("text",) if texts and self.num_image_tokens == 0 else self.paths

    def to_sequences(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (S, L, D), zero where no token stands."""
        x_PD = x_TD.new_zeros(self.num_sequences * self.length, x_TD.shape[1])
        return x_PD.index_copy(0, self.place_T, x_TD).view(self.num_sequences, self.length, x_TD.shape[1])

    def to_tokens(self, x_SLD: Tensor) -> Tensor:
        """(S, L, D) -> (T, D)."""
        return x_SLD.flatten(0, 1).index_select(0, self.place_T)


torch.export.register_dataclass(Layout, serialized_type_name=f"{__name__}.Layout")


def build_layout(batch: Batch, image_length: int, paths: tuple[str, ...] = ("vision", "text")) -> Layout:
    """The layout of a batch whose images have `image_length` tokens each. Waits for no device.

    `paths` are the modalities that the model can take.
    """
    sequence_T = torch.cat([batch.sequence_of_image.repeat_interleave(image_length), batch.sequence_of_text])
    inside_image = torch.arange(image_length, device=sequence_T.device).repeat(batch.num_images)
    text_start = image_length if batch.fused else 0
    inside_T = torch.cat([inside_image, batch.text_positions_T + text_start])
    image_part = image_length if batch.num_images else 0
    length = image_part + batch.longest_text if batch.fused else max(image_part, batch.longest_text)
    place_T = sequence_T * length + inside_T
    occupied = torch.zeros(batch.num_sequences * length, dtype=torch.bool, device=place_T.device)
    occupied = occupied.index_fill(0, place_T, True)
    return Layout(
        num_image_tokens=batch.num_images * image_length,
        image_length=image_length,
        num_sequences=batch.num_sequences,
        length=length,
        fused=batch.fused,
        sequence_T=sequence_T,
        place_T=place_T,
        occupied_SL=occupied.view(batch.num_sequences, length),
        identity_T=torch.cat([inside_image, batch.text_ids_T]),
        paths=(batch.only,) if batch.only in paths and sequence_T.shape[0] == 0 else paths,
    )


def by_modality(x_TD: Tensor, layout: Layout, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """Apply `functions["vision"]` to the image tokens and `functions["text"]` to the text tokens.

    A modality without tokens is left out: its weights would get a gradient of zeros. Where there is no token at all,
    both run.
    """
    if len(layout.modalities) == 1:
        return functions[layout.modalities[0]](x_TD)
    images = layout.num_image_tokens
    return torch.cat([functions["vision"](x_TD[:images]), functions["text"](x_TD[images:])])
