"""The visual tokenizer that a recipe names: files of a tokenizer, or the run that trained one."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmoe_core.checkpoint.layout import RECIPE
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.config import plugin_module
from vlmoe_core.data.codes import read_manifest
from vlmoe_core.errors import TokenizerError, UsageError
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.load import load_model_recipe
from vlmoe_core.tokenizers.visual import CONFIG_FILE, VisualTokenizer, load_visual_tokenizer, visual_folder

KEPT = "tokenizer"
"""Where stored tokens keep the tokenizer that was fitted for them."""


def trains_tokenizer(recipe: ModelRecipe) -> bool:
    """Whether what a run of this recipe trains is a visual tokenizer: a model that only turns patches into codes."""
    return isinstance(recipe, Recipe) and recipe.objective is not None and not recipe.objective.hides


def use_of_tokenizer(load: str) -> list[str]:
    """The words behind `vlmoe pretrain RECIPE` of a run that predicts the codes of a vqkd tokenizer."""
    return ["--set", "tokenizers.visual.kind=vqkd", "--set", f"tokenizers.visual.load={load}"]


def no_model(name: str) -> UsageError:
    """What to say of a visual tokenizer where a model of the stages after it is asked for."""
    return UsageError(
        f"{name} is a visual tokenizer: it turns patches into codes and does nothing else; pretrain a model on them "
        f"with: vlmoe pretrain RECIPE {shlex.join(use_of_tokenizer(name))}"
    )


def refuse_tokenizer(recipe: ModelRecipe, name: str) -> None:
    """Raises UsageError for a visual tokenizer, where a model of the stages after it is asked for."""
    if trains_tokenizer(recipe):
        raise no_model(name)


def find_visual_tokenizer(spec: str) -> VisualTokenizer:
    """Read the tokenizer that `spec` names.

    Args:
        spec: a tokenizer's folder, a model folder with one inside, a run or checkpoint in which one was trained, or
            any of these on the Hub (hf-hub:ORG/NAME).

    Raises:
        TokenizerError: there is none, or it is damaged.
        HubError: the Hub does not give it.
        CheckpointError: the checkpoint is damaged.
    """
    folder = visual_folder(spec)
    if folder is not None:
        return load_visual_tokenizer(folder)
    try:
        checkpoint = read_checkpoint(resolve(Path(spec)))
    except UsageError as error:
        wanted = "a tokenizer's folder, a model folder, or a run that trained one"
        raise TokenizerError(
            f"tokenizers.visual.load: {spec} holds no visual tokenizer ({CONFIG_FILE}) and no checkpoint; name {wanted}"
        ) from error
    recipe = load_model_recipe(checkpoint.path / RECIPE)
    if not trains_tokenizer(recipe):
        raise TokenizerError(f"tokenizers.visual.load: {spec} is a model that neither holds nor is a visual tokenizer")
    return tokenizer_in(recipe, checkpoint.model)


def tokenizer_in(recipe: ModelRecipe, tensors: Mapping[str, Tensor]) -> VisualTokenizer:
    """The tokenizer that a run trained, from the tensors of its objective.

    Raises TokenizerError if they don't fit.
    """
    assert isinstance(recipe, Recipe) and recipe.objective is not None, "trains_tokenizer says so"
    module = plugin_module("vlmoe_core.objectives.kinds", recipe.objective.name)
    tokenizer: VisualTokenizer = module.trained_tokenizer(
        recipe.objective, recipe.model, recipe.tokenizers.visual.codebook_size, tensors
    )
    return tokenizer


def kept_tokenizer(tokens: Path) -> VisualTokenizer:
    """The tokenizer that was fitted for a folder of stored tokens. Raises TokenizerError where none was."""
    read_manifest(tokens)
    if not (tokens / KEPT).is_dir():
        raise TokenizerError(
            f"{tokens} keeps no tokenizer: its codes are of one that the recipe named when they were stored; name it "
            "with tokenizers.visual.load"
        )
    return load_visual_tokenizer(tokens / KEPT)
