"""Image-text contrast over the batches of all ranks (CLIP, arXiv 2103.00020; VLMo, arXiv 2111.02358, section 3.2).

Axis letters: X pairs of this rank, G pairs of all ranks, D width.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName


def contrast(image_XD: Tensor, text_XD: Tensor, image_ids_X: Tensor, scale: Tensor, over_ranks: bool) -> Tensor:
    """The sum over this rank's pairs of the mean of the two cross-entropies, image to text and text to image.

    Texts of the same picture are all right answers, with equal shares. Every rank computes the loss of all pairs, but
    has a gradient for its own features only: nothing is sent in the backward pass.

    Args:
        image_XD: unit vectors.
        text_XD: unit vectors.
        image_ids_X: number of the picture of each pair.
        scale: factor on the cosines.
        over_ranks: compare with the pairs of all ranks; every rank calls it then.
    """
    if not (over_ranks and dist.is_available() and dist.is_initialized()):
        return _losses(image_XD, text_XD, image_ids_X, scale).sum()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths = _lengths(image_ids_X)
    images, texts, ids = (_gathered(part, lengths) for part in (image_XD.detach(), text_XD.detach(), image_ids_X))
    images[rank], texts[rank] = image_XD, text_XD
    # The whole loss on each of the ranks gives the scale its gradient so many times.
    scale = scale.detach() + (scale - scale.detach()) / ranks
    losses_G = _losses(torch.cat(images), torch.cat(texts), torch.cat(ids), scale)
    start = sum(part.shape[0] for part in images[:rank])
    own = losses_G.detach()[start : start + image_XD.shape[0]].sum()
    whole = losses_G.sum()
    return own + (whole - whole.detach())


def _losses(image_GD: Tensor, text_GD: Tensor, image_ids_G: Tensor, scale: Tensor) -> Tensor:
    """(G,) of each pair."""
    same_GG = (image_ids_G[:, None] == image_ids_G).to(image_GD.dtype)
    target_GG = same_GG / same_GG.sum(1, keepdim=True).clamp(min=1)
    dtype = torch.promote_types(image_GD.dtype, torch.float32)
    with torch.autocast(image_GD.device.type, enabled=False):
        logits_GG = scale.to(dtype) * (image_GD.to(dtype) @ text_GD.to(dtype).T)
        to_text = F.cross_entropy(logits_GG, target_GG.to(logits_GG.dtype), reduction="none")
        to_image = F.cross_entropy(logits_GG.T, target_GG.to(logits_GG.dtype), reduction="none")
    return (to_text + to_image) / 2


def _lengths(part: Tensor) -> list[int]:
    """Of the parts of all ranks. The device is waited for once, however many ranks there are."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([part.shape[0]], device=part.device))
    found: list[int] = torch.cat(lengths).tolist()
    return found


def _gathered(part: Tensor, lengths: list[int]) -> list[Tensor]:
    """The parts of all ranks, which may differ in length."""
    padded = part.new_zeros(max(lengths), *part.shape[1:])
    padded[: part.shape[0]] = part
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [whole[:length] for whole, length in zip(parts, lengths, strict=True)]


def alone(batch: Batch) -> dict[StreamName, Batch]:
    """The images of a batch of pairs alone, and the texts alone, with nothing hidden."""
    nothing = batch.text_ids_T[:0]
    number_S = torch.arange(batch.num_sequences, device=nothing.device)
    seen_T = torch.where(batch.text_targets_T >= 0, batch.text_targets_T, batch.text_ids_T)
    single = replace(
        batch,
        fused=False,
        example_of_sequence=number_S,
        num_masked_patches=0,
        num_masked_words=0,
        targets=None,
        codes_IP=None,
    )
    image = replace(
        single,
        patch_mask_IP=torch.zeros_like(batch.patch_mask_IP),
        sequence_of_image=number_S,
        text_ids_T=nothing,
        text_targets_T=nothing,
        text_positions_T=nothing,
        sequence_of_text=nothing,
        longest_text=0,
        only="vision",
    )
    text = replace(
        single,
        pixels_ICHW=batch.pixels_ICHW[:0],
        patch_mask_IP=batch.patch_mask_IP[:0],
        image_ids=batch.image_ids[:0],
        sequence_of_image=nothing,
        text_ids_T=seen_T,
        text_targets_T=torch.full_like(seen_T, -1),
        only="text",
    )
    return {"image": image, "text": text}
