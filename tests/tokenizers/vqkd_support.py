"""Small tokenizers with random weights."""

from typing import Any

import torch
from torch import Tensor

from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.vqkd import NO_WORDS, VQKD, CodeHead, FeatureDecoder, VQKDShape


def encoder_of(**values: Any) -> ModelConfig:
    """Two blocks over 4 x 4 patches of 4 pixels."""
    small = {
        "modality": "vision",
        "layers": 2,
        "dim": 24,
        "heads": 3,
        "hidden": 40,
        "vl_layers": 0,
        "patch_size": 4,
        "image_size": 16,
        "init_std": 0.2,
        "drop_path": 0.0,
    }
    return ModelConfig.model_validate({**small, **values})


def shape_of(teacher: TeacherConfig | None = None, codes: int = 20, **values: Any) -> VQKDShape:
    """20 codes of width 6."""
    return VQKDShape(encoder_of(**values), codes, code_dim=6, decoder_layers=1, teacher=teacher or TeacherConfig())


def random_tensors(shape: VQKDShape, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a tokenizer, by name."""
    torch.manual_seed(seed)
    parts = {
        "encoder": Encoder(shape.model, NO_WORDS),
        "codes": CodeHead(shape),
        "decoder": FeatureDecoder(shape),
    }
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


def random_tokenizer(shape: VQKDShape | None = None, seed: int = 0) -> VQKD:
    """A tokenizer."""
    shape = shape or shape_of()
    return VQKD(shape, random_tensors(shape, seed))


def pictures(count: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    """(count, 3, size, size) uint8, of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
