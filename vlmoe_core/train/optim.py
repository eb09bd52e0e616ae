"""Optimiser, its parameter groups, and the learning rate of a step."""

import math

import torch
from torch import nn

from vlmoe_core.train.config import OptimConfig

NORMS = (nn.LayerNorm, nn.GroupNorm)
UNDECAYED = ("bias", "q_bias", "v_bias", "position", "cls", "mask", "kind", "scale1", "scale2", "temperature")


def is_decayed(module: nn.Module, name: str) -> bool:
    """Whether a module's own parameter is a weight matrix or a word embedding, which decay.

    Norms, biases, positions, layer scales and the embeddings of [CLS], mask and kind do not (BEiT), whatever their
    shape: the fused biases of experts are biases.
    """
    return not isinstance(module, NORMS) and name not in UNDECAYED


def parameter_roles(model: nn.Module) -> dict[str, bool]:
    """Every trainable parameter by its full name, and whether it decays."""
    return {
        f"{prefix}.{name}" if prefix else name: is_decayed(module, name)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one group that decays and one that does not."""
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n, decays in roles.items() if decays], "weight_decay": config.weight_decay},
        {"params": [parameters[n] for n, decays in roles.items() if not decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of a 0-based step: linear warm-up, then a cosine from `lr` to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
