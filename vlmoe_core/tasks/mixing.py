"""Mixup, cutmix and label smoothing of a batch of pictures.

Axis letters: X examples, A labels, C channels, H height, W width.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch


@dataclass(frozen=True)
class Mixing:
    """Mixes every picture with the one that stands as far from the end, and their targets alike.

    Draws from torch's default generator, which the trainer seeds for each micro-batch.
    """

    mixup: float
    """alpha of mixup (arXiv 1710.09412); 0: none."""
    cutmix: float
    """alpha of cutmix (arXiv 1905.04899); 0: none."""
    smoothing: float
    """Share of the target that is spread over all labels."""
    num_labels: int
    """A."""

    def __call__(self, batch: Batch) -> Batch:
        """The batch with mixed pictures and targets (X, A)."""
        assert batch.targets is not None
        target_XA = F.one_hot(batch.targets, self.num_labels).to(torch.float32)
        target_XA = target_XA * (1 - self.smoothing) + self.smoothing / self.num_labels
        pixels, share = batch.pixels_ICHW, 1.0
        alphas = [alpha for alpha in (self.mixup, self.cutmix) if alpha]
        if alphas:
            cuts = bool(self.cutmix) and (len(alphas) == 1 or bool(torch.rand(()) < 0.5))
            alpha = torch.tensor(self.cutmix if cuts else self.mixup)
            share = float(torch.distributions.Beta(alpha, alpha).sample())
            pixels, share = (_cut if cuts else _blend)(pixels, share)
        return replace(batch, pixels_ICHW=pixels, targets=share * target_XA + (1 - share) * target_XA.flip(0))


def _blend(pixels: Tensor, share: float) -> tuple[Tensor, float]:
    mixed = pixels.to(torch.float32)
    return share * mixed + (1 - share) * mixed.flip(0), share


def _cut(pixels: Tensor, share: float) -> tuple[Tensor, float]:
    """A box of area 1 - share around a uniform centre comes from the other picture; what is left of the share."""
    height, width = pixels.shape[-2:]
    side = math.sqrt(1 - share)
    centre = torch.rand(2).tolist()
    (top, bottom), (left, right) = (
        (max(0, round(c * n - side * n / 2)), min(n, round(c * n + side * n / 2)))
        for c, n in zip(centre, (height, width), strict=True)
    )
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
