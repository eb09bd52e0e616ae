"""Small models and random batches for the tests of model and objectives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.model.config import ModelConfig

VOCAB, CODES = 50, 30

SPARSE: dict[str, Any] = {
    "vision": {"num_experts": 4, "layers": [1, 2]},
    "text": {"num_experts": 3, "layers": [0, 2], "top_k": 2},
}
"""Both modalities, a sparse layer below and one in the fused top."""

SHARED: dict[str, Any] = {
    "expert_pool": "shared",
    "moe": {
        "shared": {
            "num_experts": 4,
            "layers": [1, 2],
            "top_k": 2,
            "vision_balance": {"global_entropy": 0.04},
            "text_balance": {"local_entropy": 0.04, "global_entropy": 0.04},
        }
    },
}
"""One pool for both modalities, below and in the fused top."""


def config_of(**values: Any) -> ModelConfig:
    """Three blocks, the last one fused; 16 patches."""
    small = {
        "layers": 3,
        "dim": 24,
        "heads": 3,
        "hidden": 40,
        "vl_layers": 1,
        "patch_size": 4,
        "image_size": 16,
        "max_text_length": 24,
        "drop_path": 0.0,
    }
    return ModelConfig.model_validate({**small, **values})


BEIT3: dict[str, Any] = {"attention": "per_modality", "norm": "per_modality", "sub_norm": True, "norm_eps": 1e-5}
"""The switches of BEiT-3."""

VLMO: dict[str, Any] = {
    "norm": "per_modality",
    "qkv_bias": "qv",
    "layer_scale": 0.1,
    "positions": "relative",
    "text_embed_norm": True,
}
"""Those of VLMo."""

Token = tuple[StreamName, int]
"""image or text, and its place there from 0 = [CLS]."""


def relative_row(query: Token, key: Token, grid: int, longest: int) -> int:
    """The row of a relative table for two tokens of a sequence, as VLMo's released tables have them."""
    image = (2 * grid - 1) ** 2 + 3
    if query[0] != key[0]:
        return image if query[0] == "text" else image + 1
    end = image if query[0] == "image" else image + 2 + 2 * longest
    if query[1] == 0 or key[1] == 0:
        return end - 1 if query[1] == key[1] else end - 3 if query[1] == 0 else end - 2
    if query[0] == "text":
        return image + 2 + (key[1] - query[1]) + longest - 2
    (y, x), (other_y, other_x) = divmod(query[1] - 1, grid), divmod(key[1] - 1, grid)
    return (y - other_y + grid - 1) * (2 * grid - 1) + x - other_x + grid - 1


def looped(values: dict[str, Any]) -> dict[str, Any]:
    """The same pools, their experts computed one after the other: what sub-norms need."""
    pools = {name: {**pool, "experts": "loop"} for name, pool in values.get("moe", {}).items()}
    return {**values, "moe": pools}


def randomise(module: nn.Module, std: float = 0.2) -> None:
    """Every parameter random, so that none can be left out unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)


def samples_of(stream: StreamName, lengths: Sequence[int], config: ModelConfig, seed: int = 0) -> list[Sample]:
    """Random examples, one for each text length; of the image stream their number alone counts."""
    rng = np.random.default_rng(seed)
    return [_sample(stream, number, length, config, rng) for number, length in enumerate(lengths)]


def _sample(stream: StreamName, number: int, length: int, config: ModelConfig, rng: np.random.Generator) -> Sample:
    pixels = mask = ids = targets = None
    if stream != "text":
        pixels = rng.integers(0, 256, (3, config.image_size, config.image_size), dtype=np.uint8)
        mask = rng.random(config.num_patches) < 0.4
    if stream != "image":
        ids = rng.integers(0, VOCAB, length)
        targets = np.where(rng.random(length) < 0.4, ids, -1)
    return Sample(f"{stream}:{number}", number, number, pixels, mask, ids, targets)


def batch_of(stream: StreamName, lengths: Sequence[int], config: ModelConfig, seed: int = 0) -> Batch:
    """The batch of `samples_of`."""
    return collate_of(stream, samples_of(stream, lengths, config, seed), config)


def collate_of(stream: StreamName, samples: Sequence[Sample], config: ModelConfig) -> Batch:
    """The batch of samples."""
    return collate(stream, samples, config.image_size, config.num_patches)
