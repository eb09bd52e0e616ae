"""The format `safetensors`: a model folder, which every verb and `VLMoE.from_pretrained` open."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe_core.checkpoint.manifest import FORMAT
from vlmoe_core.checkpoint.shards import MAX_SHARD_BYTES, separate_tied
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_model
from vlmoe_core.environment import environment
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.load import dump_recipe
from vlmoe_core.train.fitting import Tokenizers

Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Turns the tensors of a model into those that are written."""
ROUTER = ".router."


def unchanged(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors as they are."""
    return state


@dataclass(frozen=True)
class NativeOptions:
    """How a model folder is written."""

    change: Change = unchanged
    """What is done to the tensors: a lower precision, int8."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A shard is cut before it grows beyond this."""
    visual: bool = True
    """Take the visual tokenizer along, where there is one."""


def write_native(
    recipe: ModelRecipe,
    tokenizers: Tokenizers,
    objective: nn.Module,
    step: int,
    folder: Path,
    options: NativeOptions,
) -> Path:
    """Write a model folder: safetensors with their index, config.json, recipe, tokenizers, environment.

    Args:
        recipe: of the model.
        tokenizers: of the model.
        objective: encoder and heads; tensors that it ties are stored once.
        step: optimiser steps that it was trained for.
        folder: new or empty.
        options: how it is written.

    Raises:
        UsageError: the folder holds files.
        CheckpointError: the disk refuses.
    """

    def write_tokenizers(target: Path) -> None:
        tokenizers.text.save(target / "text")
        if options.visual and tokenizers.visual is not None:
            tokenizers.visual.save(target / "visual")
        if tokenizers.labels.names:
            tokenizers.labels.save(target / "labels")

    def write_more(target: Path) -> None:
        (target / "config.json").write_text(_json(config_of(recipe)), encoding="utf-8")
        (target / "environment.json").write_text(_json(environment()), encoding="utf-8")

    return write_model(
        folder,
        options.change(objective.state_dict()),
        RunState(step, {}),
        dump_recipe(recipe),
        write_tokenizers,
        max_shard_bytes=options.max_shard_bytes,
        more=write_more,
    )


def config_of(recipe: ModelRecipe) -> dict[str, Any]:
    """What config.json says. It is for readers of the Hub; this package reads recipe.yaml."""
    found: dict[str, Any] = {"library_name": "vlmoe", "model_type": "vlmoe", "architectures": ["VLMoE"]}
    found |= {"format": FORMAT, "vocab_size": recipe.tokenizers.text.vocab_size}
    if isinstance(recipe, Recipe):
        aim = recipe.task or recipe.objective
        found["trained_for"] = aim.name if aim is not None else None
    return found | {"model": recipe.model.model_dump(mode="json")}


def in_dtype(dtype: torch.dtype) -> Change:
    """Turns floating-point weights into another type; those of routers stay, as their choices hang on little."""

    def change(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        stored, tied = separate_tied(state)
        changed = {
            name: tensor.to(dtype) if tensor.is_floating_point() and ROUTER not in name else tensor
            for name, tensor in stored.items()
        }
        return {name: changed[tied.get(name, name)] for name in state}

    return change


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
