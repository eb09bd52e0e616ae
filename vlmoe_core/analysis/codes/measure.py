"""What a trained visual tokenizer makes of held-out images: which codes it uses, and how much they tell of a patch.

Axis letters: I images, P patches, K codes, C channels, H height, W width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.tokenizers.codebook import Codebook
from vlmoe_core.tokenizers.teachers.teacher import Teacher
from vlmoe_core.tokenizers.visual import VisualTokenizer, unit_range
from vlmoe_core.tokenizers.vqkd import VQKD

SHOWN = 5
"""Codes that are named at either end."""


@dataclass(frozen=True)
class CodeShare:
    """How often a code is chosen."""

    code: int
    """Its id."""
    share: float
    """Of all patches, 0 to 1."""


@dataclass(frozen=True)
class CodeUse:
    """How patches use the codes."""

    used: float
    """Share of the codes that at least one patch has, 0 to 1."""
    perplexity: float
    """exp of the entropy of the codes: the number of equally frequent codes that would be as uncertain."""
    most: tuple[CodeShare, ...]
    """The codes of the most patches, the first the most used."""
    least: tuple[CodeShare, ...]
    """Those of the fewest, the first the least used."""


@dataclass(frozen=True)
class PixelError:
    """Error of drawn pixels, in [0, 1]."""

    mse: float
    """Mean squared error."""
    psnr: float
    """-10 log10 of it, in dB, at most 100."""


@dataclass(frozen=True)
class Measured:
    """All that is measured on the held-out images."""

    images: int
    """Their number."""
    use: CodeUse
    """Of the tokenizer's codes."""
    cosine: float
    """Mean over the patches, of the teacher's features and what the decoder makes of the codes."""
    pixels: PixelError | None
    """Where the teacher is the pixels: of the images that the codes draw."""
    kmeans: PixelError | None
    """Of those that a k-means codebook of equal size draws; null where none was given."""
    nearer: float | None
    """Share of the images, 0 to 1, that the tokenizer draws nearer than the codebook does; null likewise."""


def use_of(patches_K: Tensor, shown: int = SHOWN) -> CodeUse:
    """Code use from the number of patches of each code, at least one in all."""
    share_K = patches_K.double() / patches_K.sum()
    there = share_K[share_K > 0]
    order = share_K.argsort(descending=True, stable=True).tolist()
    named = [CodeShare(code, float(share_K[code])) for code in order]
    perplexity = math.exp(float(torch.special.entr(there).sum()))
    return CodeUse(len(there) / len(share_K), perplexity, tuple(named[:shown]), tuple(named[::-1][:shown]))


def pixel_error(mse: float) -> PixelError:
    """With its PSNR."""
    return PixelError(mse, -10 * math.log10(max(mse, 1e-10)))


@torch.no_grad()
def measure(
    tokenizer: VQKD, teacher: Teacher, codebook: Codebook | None, images: Iterable[Tensor], device: torch.device
) -> Measured:
    """Encode images and compare what their codes tell with the teacher, and with the pixels where it is the pixels.

    Args:
        tokenizer: the trained one.
        teacher: whose features it was taught.
        codebook: what its pixels are compared with.
        images: batches (I, C, H, W), uint8, of one size; at least one image in all.
        device: where to compute.
    """
    counts_K = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    number, cosines, own, other = 0, [], [], []
    for pixels_ICHW in images:
        pixels_ICHW = pixels_ICHW.to(device)
        ids_IP = tokenizer.encode(pixels_ICHW)
        counts_K += torch.bincount(ids_IP.flatten(), minlength=len(counts_K)).cpu()
        cosine_IP = F.cosine_similarity(tokenizer.features(ids_IP), teacher.features(pixels_ICHW), dim=-1)
        number += len(pixels_ICHW)
        cosines.append(cosine_IP.cpu().double().mean(-1))
        if tokenizer.draws:
            own.append(_errors(tokenizer, pixels_ICHW))
        if codebook is not None:
            other.append(_errors(codebook, pixels_ICHW))
    cosine = float(torch.cat(cosines).mean())
    return Measured(number, use_of(counts_K), cosine, _mean(own), _mean(other), _nearer(own, other))


def _errors(tokenizer: VisualTokenizer, pixels_ICHW: Tensor) -> Tensor:
    """(I,) mean squared error of each image."""
    drawn_ICHW = tokenizer.decode(tokenizer.encode(pixels_ICHW))
    return (drawn_ICHW - unit_range(pixels_ICHW)).cpu().double().square().flatten(1).mean(1)


def _nearer(own: list[Tensor], other: list[Tensor]) -> float | None:
    return float((torch.cat(own) < torch.cat(other)).double().mean()) if own and other else None


def _mean(errors: list[Tensor]) -> PixelError | None:
    return pixel_error(float(torch.cat(errors).mean())) if errors else None
