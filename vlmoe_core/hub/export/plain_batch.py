"""Batches from plain tensors: packed at the entrance of a graph.

Axis letters: B examples, n images of an example, L places of a text, S sequences, P patches, T real tokens.
"""

import torch
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.model.config import ModelConfig


def batch_of_images(pixel_values: Tensor, num_patches: int) -> Batch:
    """Images (B, 3, H, W) alone, nothing hidden."""
    none = pixel_values.new_zeros(0, dtype=torch.int64)
    number_B = torch.arange(pixel_values.shape[0], device=pixel_values.device)
    return _batch(pixel_values, num_patches, number_B, (none, none, none), 0, None)


def batch_of_texts(
    input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None, config: ModelConfig
) -> Batch:
    """Texts (B, L) alone; `token_type_ids` is 1 for the tokens of the second of two sentences."""
    none = input_ids.new_zeros(0, 3, config.image_size, config.image_size, dtype=torch.uint8)
    number_B = torch.arange(input_ids.shape[0], device=input_ids.device)
    packed = _packed(input_ids, attention_mask)
    second_T = None if token_type_ids is None else token_type_ids[packed[2], packed[1]] == 1
    return _batch(none, config.num_patches, number_B, packed, input_ids.shape[1], second_T)


def batch_of_pairs(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, num_patches: int) -> Batch:
    """Images (B, 3, H, W) or (B, n, 3, H, W), each a sequence together with its example's text (B, L)."""
    if pixel_values.dim() == 5:
        images = pixel_values.shape[1]
        pixel_values = pixel_values.flatten(0, 1)
        input_ids, attention_mask = (t.repeat_interleave(images, 0) for t in (input_ids, attention_mask))
    number_S = torch.arange(pixel_values.shape[0], device=pixel_values.device)
    return _batch(
        pixel_values, num_patches, number_S, _packed(input_ids, attention_mask), input_ids.shape[1], None, fused=True
    )


def _packed(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Id, place in its text, and text of every real token (T,)."""
    text_T, place_T = attention_mask.nonzero().unbind(1)
    torch._check(text_T.shape[0] >= 1)  # type: ignore[no-untyped-call]  # torch.export must know: there are tokens
    return input_ids[text_T, place_T], place_T, text_T


def _batch(
    pixels: Tensor,
    num_patches: int,
    number_S: Tensor,
    packed: tuple[Tensor, Tensor, Tensor],
    length: int,
    second_T: Tensor | None,
    fused: bool = False,
) -> Batch:
    """`length`: places of the longest text; more than it has tokens does no harm."""
    ids_T, place_T, text_T = packed
    images = number_S[: pixels.shape[0]]
    return Batch(
        fused=fused,
        pixels_ICHW=pixels,
        patch_mask_IP=torch.zeros(pixels.shape[0], num_patches, dtype=torch.bool, device=pixels.device),
        image_ids=images,
        sequence_of_image=images,
        text_ids_T=ids_T,
        text_targets_T=torch.full_like(ids_T, -1),
        text_positions_T=place_T,
        sequence_of_text=text_T,
        example_of_sequence=number_S,
        positions=number_S,
        longest_text=length,
        num_masked_patches=0,
        num_masked_words=0,
        second_text_T=second_T,
    )
