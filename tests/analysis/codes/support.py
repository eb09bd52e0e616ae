"""Tiny tokenizers: drawn at random, and trained for two steps."""

from pathlib import Path

import torch

from tests.train.support import train
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.vqkd import NO_WORDS, VQKD, CodeHead, FeatureDecoder, VQKDShape

CODES = 16
RECIPE = f"""
seed: 3
model: {{modality: vision, layers: 1, dim: 16, heads: 2, hidden: 32, vl_layers: 0, patch_size: 4, image_size: 16}}
tokenizers: {{visual: {{codebook_size: {CODES}, fit_images: 8, iterations: 3}}}}
data:
  workers: 0
  train: {{image: [{{source: scenes, size: 50, image_size: 16}}]}}
  eval: {{image: [{{source: scenes, size: 11, image_size: 16, split: eval}}]}}
objective: {{name: vqkd, code_dim: 4, decoder_layers: 1, kmeans_iterations: 3}}
batch: {{size: {{image: 8}}, micro: {{image: 4}}}}
optim: {{lr: 1.0e-2, warmup_steps: 1}}
train: {{steps: 2, log_every: 1, eval_every: 2, eval_examples: 10, save_every: 2}}
"""


def shape(teacher: TeacherConfig = TeacherConfig()) -> VQKDShape:
    """A grid of 4 x 4 patches of 4 pixels."""
    sizes = {"layers": 1, "dim": 16, "heads": 2, "hidden": 32, "vl_layers": 0, "patch_size": 4, "image_size": 16}
    model = ModelConfig.model_validate({**sizes, "modality": "vision", "init_std": 0.5})
    return VQKDShape(model, CODES, code_dim=4, decoder_layers=1, teacher=teacher)


def random_tokenizer(teacher: TeacherConfig = TeacherConfig()) -> VQKD:
    """Untrained; its codes depend on the image."""
    torch.manual_seed(1)
    sizes = shape(teacher)
    parts = {"encoder": Encoder(sizes.model, NO_WORDS), "codes": CodeHead(sizes), "decoder": FeatureDecoder(sizes)}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    return VQKD(sizes, tensors)


def tokenizer_run(folder: Path, *overrides: str) -> Path:
    """The run folder of the recipe above."""
    path = folder / "tokens.yaml"
    path.write_text(RECIPE)
    return train(load_recipe(str(path), overrides), folder / "run").folder


def random_images(count: int) -> torch.Tensor:
    """(I, 3, 16, 16), uint8, of coarse colours."""
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
