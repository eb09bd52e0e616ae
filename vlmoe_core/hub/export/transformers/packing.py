"""From padded tensors to the packed tokens of a batch, and back.

Axis letters: S sequences, L places of a text, I images, P patches, C channels, H height, W width, T text tokens,
D width.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.model.config import ModelConfig


@dataclass(frozen=True)
class Texts:
    """Texts as a tokenizer pads them."""

    ids_SL: Tensor
    """int64."""
    mask_SL: Tensor
    """bool, True where a token stands."""
    second_SL: Tensor | None
    """bool, True for the tokens of the second of two texts."""

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Self:
        """The texts of a model's arguments. Raises ValueError for a text without tokens."""
        mask_SL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if not bool(mask_SL.any(dim=1).all()):
            raise ValueError("attention_mask leaves a text without any token: give it [CLS] and [SEP] at least")
        return cls(input_ids, mask_SL, None if token_type_ids is None else token_type_ids.bool())

    def repeated(self, times: int) -> "Texts":
        """Each text so many times."""
        second_SL = None if self.second_SL is None else self.second_SL.repeat_interleave(times, 0)
        return Texts(self.ids_SL.repeat_interleave(times, 0), self.mask_SL.repeat_interleave(times, 0), second_SL)

    def padded(self, values_TD: Tensor) -> Tensor:
        """(T, D) of the tokens -> (S, L, D), 0 where no token stands."""
        padded_SLD = values_TD.new_zeros(*self.mask_SL.shape, values_TD.shape[1])
        padded_SLD[self.mask_SL] = values_TD
        return padded_SLD


def pack(
    texts: Texts | None, pixel_values: Tensor | None, bool_masked_pos: Tensor | None, config: ModelConfig
) -> Batch:
    """A batch without padding: images alone, texts alone, or each image with the text of its number.

    Args:
        texts: the texts; null: none.
        pixel_values: uint8 (I, 3, H, W), or (S, n, 3, H, W) for n images of each text; null: none.
        bool_masked_pos: (I, P), True for hidden patches; null: none is hidden.
        config: sizes that the inputs must have.

    Raises:
        ValueError: there is neither, or a size or a dtype does not fit.
    """
    if texts is None and pixel_values is None:
        raise ValueError("give input_ids, pixel_values or both")
    per_example = pixel_values.shape[1] if pixel_values is not None and pixel_values.dim() == 5 else 1
    pixels_ICHW = _pixels(pixel_values, texts, config)
    images = pixels_ICHW.shape[0]
    if texts is not None and pixel_values is not None:
        texts = texts.repeated(per_example)
        if texts.ids_SL.shape[0] != images:
            raise ValueError(f"{images} images came with {texts.ids_SL.shape[0]} texts: each image needs its text")
    sequences = images if texts is None else texts.ids_SL.shape[0]
    device = pixels_ICHW.device
    number_S = torch.arange(sequences, device=device)
    text = _text_parts(texts, number_S, config)
    hidden_IP = torch.zeros(images, config.num_patches, dtype=torch.bool, device=device)
    return Batch(
        fused=texts is not None and pixel_values is not None,
        pixels_ICHW=pixels_ICHW,
        patch_mask_IP=hidden_IP if bool_masked_pos is None else bool_masked_pos.bool().view_as(hidden_IP),
        image_ids=number_S[:images],
        sequence_of_image=number_S[:images],
        text_ids_T=text.ids_T,
        text_targets_T=torch.full_like(text.ids_T, -1),
        text_positions_T=text.positions_T,
        sequence_of_text=text.sequence_T,
        example_of_sequence=number_S // per_example,
        positions=number_S[: sequences // per_example],
        longest_text=text.longest,
        num_masked_patches=0,
        num_masked_words=0,
        second_text_T=text.second_T,
    )


def _pixels(pixel_values: Tensor | None, texts: Texts | None, config: ModelConfig) -> Tensor:
    """(I, 3, H, W)."""
    side = config.image_size
    if pixel_values is None:
        assert texts is not None
        return torch.zeros(0, 3, side, side, dtype=torch.uint8, device=texts.ids_SL.device)
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"pixel_values must be uint8 from 0 to 255, which the model scales, not {pixel_values.dtype}")
    if pixel_values.shape[-3:] != (3, side, side):
        raise ValueError(f"pixel_values must end in (3, {side}, {side}), not in {tuple(pixel_values.shape[-3:])}")
    return pixel_values.flatten(0, -4)


@dataclass(frozen=True)
class _Packed:
    """The tokens of all texts, one text after the other."""

    ids_T: Tensor
    positions_T: Tensor
    sequence_T: Tensor
    second_T: Tensor | None
    longest: int


def _text_parts(texts: Texts | None, number_S: Tensor, config: ModelConfig) -> _Packed:
    if texts is None:
        nothing = number_S[:0]
        return _Packed(nothing, nothing, nothing, None, 0)
    mask_SL = texts.mask_SL
    longest = int(mask_SL.sum(dim=1).max()) if mask_SL.shape[0] else 0
    if longest > config.max_text_length:
        raise ValueError(f"a text has {longest} tokens, the model has positions for {config.max_text_length}: cut it")
    return _Packed(
        ids_T=texts.ids_SL[mask_SL],
        positions_T=(mask_SL.cumsum(dim=1) - 1)[mask_SL],
        sequence_T=number_S[:, None].expand_as(mask_SL)[mask_SL],
        second_T=None if texts.second_SL is None else texts.second_SL[mask_SL],
        longest=longest,
    )
