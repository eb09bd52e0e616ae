"""What stands on the encoder in pretraining, and where images and texts are compared.

Axis letters: X pairs, S sequences, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoded

INITIAL_TEMPERATURE = 0.07
LARGEST_SCALE = 100.0


class ContrastHead(nn.Module):
    """Maps [CLS] of an image alone and of a text alone to unit vectors of one space (VLMo, BEiT-3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.image = nn.Linear(dim, dim, bias=False)
        self.text = nn.Linear(dim, dim, bias=False)
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))
        """Logarithm of the factor on the cosines."""

    def forward(self, image_XD: Tensor, text_XD: Tensor) -> tuple[Tensor, Tensor]:
        """(X, D) unit vectors of the images and of the texts."""
        return self.of_images(image_XD), self.of_texts(text_XD)

    def of_images(self, image_XD: Tensor) -> Tensor:
        """(X, D) unit vectors of images."""
        return F.normalize(self.image(image_XD), dim=-1)

    def of_texts(self, text_XD: Tensor) -> Tensor:
        """(X, D) unit vectors of texts."""
        return F.normalize(self.text(text_XD), dim=-1)

    @property
    def scale(self) -> Tensor:
        """The factor on the cosines, at most 100 (CLIP)."""
        return self.temperature.exp().clamp(max=LARGEST_SCALE)


def pool_cls(encoded: Encoded) -> Tensor:
    """(S, D) final states of [CLS] of a batch of images alone or of texts alone."""
    return encoded.image_cls_ID if encoded.layout.num_image_tokens else encoded.text_cls_SD


class MaskedHeads(nn.Module):
    """One linear map to the words and one to the visual codes, shared by single inputs and pairs."""

    def __init__(self, config: ModelConfig, vocab_size: int, codebook_size: int) -> None:
        super().__init__()
        self.text = nn.Linear(config.dim, vocab_size)
        self.image = nn.Linear(config.dim, codebook_size)
        for head in (self.text, self.image):
            nn.init.trunc_normal_(head.weight, std=config.init_std)
            nn.init.zeros_(head.bias)
