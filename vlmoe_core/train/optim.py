"""Optimiser, its parameter groups, and the learning rate of a step."""

import math
import re

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from vlmoe_core.moe.experts import ExpertNorm
from vlmoe_core.train.config import OptimConfig

NORMS = (nn.LayerNorm, nn.GroupNorm, ExpertNorm)
UNDECAYED = ("bias", "q_bias", "v_bias", "position", "table", "cls", "mask", "kind", "scale1", "scale2", "temperature")

BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
FACTOR = "factor"
"""Key of a parameter group: what the learning rate of a step is multiplied by."""


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


def rate_factor(name: str, layers: int, config: OptimConfig) -> float:
    """The factor on a parameter's learning rate, by its full name: layer-wise decay (BEiT), or that of the heads."""
    if not name.startswith("encoder."):
        return config.head_lr
    if name.startswith("encoder.embeddings."):
        return config.layer_decay ** (layers + 1)
    block = BLOCK.match(name)
    return config.layer_decay ** (layers - int(block[1])) if block else 1.0


def build_optimizer(model: nn.Module, config: OptimConfig, layers: int) -> torch.optim.AdamW:
    """AdamW with a group for each weight decay (some or none) and each factor on the learning rate.

    Parameters that are cut over different sets of processes are in different groups, as torch's fused kernel asks for.

    Args:
        model: the objective, wrapped already where parameters are cut.
        config: rates.
        layers: blocks of its encoder.
    """
    parameters = dict(model.named_parameters())
    members: dict[tuple[bool, float, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, decays in parameter_roles(model).items():
        mesh = getattr(parameters[name], "device_mesh", None)
        members.setdefault((decays, rate_factor(name, layers, config), mesh), []).append(parameters[name])
    groups = [
        {"params": found, "weight_decay": config.weight_decay if decays else 0.0, FACTOR: factor}
        for (decays, factor, _), found in sorted(members.items(), key=lambda item: (not item[0][0], -item[0][1]))
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of a 0-based step: linear warm-up, then a cosine from `lr` to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
