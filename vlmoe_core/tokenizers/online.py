"""A visual tokenizer at work in a training step: frozen, in arithmetic of its own."""

from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlmoe_core.moe.precision import without_autocast
from vlmoe_core.tokenizers.frozen import Frozen
from vlmoe_core.tokenizers.visual import VisualTokenizer

Precision = Literal["fp32", "bf16"]


class ImageCoder(Protocol):
    """What turns images into the targets of masked image modelling."""

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Ids (B, N), int64, of RGB images."""
        ...


class OnlineTokenizer(Frozen):
    """Encodes without a gradient and in its own precision, whatever autocast says around it.

    Args:
        visual: the tokenizer.
        precision: fp32, or bf16: what autocast makes of its network; its codes stay in float32.
    """

    def __init__(self, visual: VisualTokenizer, precision: Precision) -> None:
        super().__init__()
        self.visual = visual
        self.precision = precision

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Ids (B, N), int64, of RGB images: uint8, or float in [0, 1]."""
        with self._arithmetic(images_BCHW.device.type):
            return self.visual.encode(images_BCHW)

    def _arithmetic(self, device_type: str) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return without_autocast(device_type)
        return torch.autocast(device_type, dtype=torch.bfloat16)
