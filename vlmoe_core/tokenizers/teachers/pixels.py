"""The teacher `pixels`: the features of a patch are its own pixels.

A cosine loss knows only the direction of a feature. So that brightness and contrast count as well, one more, constant
feature stands behind the pixels (homogeneous coordinates): dividing by it gives the pixels back.

Axis letters: I images, P patches, O features (the pixels of a patch and one), C channels, H height, W width.
"""

import torch
from torch import Tensor

from vlmoe_core.tokenizers.visual import from_patches, to_patches, unit_range

PIXELS = "pixels"
CONSTANT = 0.5
"""The last feature, per root of the number of pixels: about as long as the pixels are together, so that both count."""


class PixelTeacher:
    """Pixels in [-1, 1], and a constant."""

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size
        self.dim = 3 * patch_size**2 + 1
        self.constant = CONSTANT * (3 * patch_size**2) ** 0.5

    def load(self) -> None:
        """There is nothing to load."""

    @torch.no_grad()
    def features(self, pixels_ICHW: Tensor) -> Tensor:
        """(I, P, O) of uint8 images, or of floats in [0, 1]."""
        patches_IPD = unit_range(to_patches(pixels_ICHW, self.patch_size)) * 2 - 1
        constant_IP1 = patches_IPD.new_full((*patches_IPD.shape[:2], 1), self.constant)
        return torch.cat([patches_IPD, constant_IP1], dim=-1)

    def images(self, features_IPO: Tensor, grid: tuple[int, int]) -> Tensor:
        """(I, 3, H, W) in [0, 1]: the pixels of features of any length; `grid` is (rows, columns)."""
        scale_IP1 = features_IPO[..., -1:].clamp_min(1e-6 * self.constant)
        patches_IPD = features_IPO[..., :-1] / scale_IP1 * self.constant
        return from_patches((patches_IPD / 2 + 0.5).clamp(0, 1), self.patch_size, grid)
