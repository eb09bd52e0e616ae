"""Tokens from pixels and from word ids.

Axis letters: I images, N tokens of an image ([CLS] and P patches), P patches, T text tokens, D width, C channels,
H height, W width in pixels.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.model.config import ModelConfig

NUM_KINDS = 2
IMAGE_KIND, TEXT_KIND = 0, 1
WORD_EPS = 1e-12
"""BERT's: embeddings have a variance so small that the blocks' epsilon would show."""


class LinearPatches(nn.Module):
    """One linear map of each patch (ViT, arXiv 2010.11929, section 3.1)."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(3 * patch_size**2, dim)

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """(I, 3, H, W) -> (I, P, D)."""
        images, _, height, width = pixels_ICHW.shape
        size = self.patch_size
        x = pixels_ICHW.view(images, 3, height // size, size, width // size, size)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(images, (height // size) * (width // size), 3 * size**2)
        out: Tensor = self.proj(x)
        return out


class ConvPatches(nn.Module):
    """3 x 3 convolutions of stride 2 with GroupNorm down to the patch grid, then a linear map (arXiv 2106.14881)."""

    def __init__(self, widths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for width in widths[1:])
        self.proj = nn.Linear(widths[-1], dim)

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """(I, 3, H, W) -> (I, P, D)."""
        x = pixels_ICHW
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        out: Tensor = self.proj(x.flatten(2).transpose(1, 2))
        return out


def _build_stem(config: ModelConfig) -> LinearPatches | ConvPatches:
    if config.patch_embed == "conv":
        return ConvPatches(config.stem_widths, config.dim)
    return LinearPatches(config.patch_size, config.dim)


class ImageEmbedding(nn.Module):
    """[CLS] and patches of an image, hidden patches replaced by the mask embedding, positions added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size, self.grid = config.patch_size, config.grid
        self.patch = _build_stem(config)
        self.cls = nn.Parameter(torch.zeros(config.dim))
        self.mask = nn.Parameter(torch.zeros(config.dim))
        self.position = nn.Parameter(torch.zeros(1 + config.num_patches, config.dim))

    def forward(self, pixels_ICHW: Tensor, mask_IP: Tensor) -> Tensor:
        """uint8 pixels and hidden patches -> (I, N, D).

        Hidden patches are blanked in the pixels as well, since a convolution looks beyond its patch.
        """
        pixels = pixels_ICHW.to(self.position.dtype) / 127.5 - 1
        patches = self.patch(pixels * self._visible(mask_IP))
        patches = torch.where(mask_IP[..., None], self.mask.to(patches.dtype), patches)
        cls = self.cls.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position

    def _visible(self, mask_IP: Tensor) -> Tensor:
        """(I, 1, H, W), 0 in hidden patches and 1 elsewhere."""
        grid_IHW = (~mask_IP).view(-1, 1, self.grid, self.grid).to(self.position.dtype)
        return grid_IHW.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)


class TextEmbedding(nn.Module):
    """Word and position embeddings, their sum normalised where the config says so."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, config.dim)
        self.position = nn.Parameter(torch.zeros(config.max_text_length, config.dim))
        self.norm = nn.LayerNorm(config.dim, eps=WORD_EPS) if config.text_embed_norm else None

    def forward(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """ids and positions -> (T, D)."""
        out: Tensor = self.word(ids_T) + F.embedding(positions_T, self.position)
        return out if self.norm is None else self.norm(out)


class Embeddings(nn.Module):
    """The packed tokens of a batch: all image tokens, then all text tokens, each with the embedding of its kind.

    `image` or `text` is None where the model has no path for it; there must be no such tokens then.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.image = ImageEmbedding(config) if "vision" in config.modalities else None
        self.text = TextEmbedding(config, vocab_size) if "text" in config.modalities else None
        self.kind = nn.Parameter(torch.zeros(NUM_KINDS, config.dim))

    def forward(self, pixels_ICHW: Tensor, mask_IP: Tensor, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """-> (T, D)."""
        parts_TD = []
        if self.image is not None:
            image_IND = self.image(pixels_ICHW, mask_IP) + self.kind[IMAGE_KIND]
            parts_TD.append(image_IND.flatten(0, 1))
        if self.text is not None:
            parts_TD.append(self.text(ids_T, positions_T) + self.kind[TEXT_KIND])
        return torch.cat(parts_TD)


def resize_positions(position_ND: Tensor, grid: int) -> Tensor:
    """Interpolate image positions to another grid, bicubic; the first row ([CLS]) stays.

    Args:
        position_ND: (1 + old_grid ** 2, D).
        grid: the new number of patches along a side.

    Returns:
        (1 + grid ** 2, D).
    """
    old = math.isqrt(position_ND.shape[0] - 1)
    if old == grid:
        return position_ND
    plane = position_ND[1:].T.reshape(1, -1, old, old)
    plane = plane.to(torch.promote_types(plane.dtype, torch.float32))
    plane = F.interpolate(plane, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = plane.flatten(2)[0].T.to(position_ND.dtype)
    return torch.cat([position_ND[:1], patches])
