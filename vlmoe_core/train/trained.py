"""A trained model, read back from its run alone: recipe, tokenizers and weights lie in its checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlmoe_core.checkpoint.layout import latest_checkpoint, resolve
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.restore import load_model_state
from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.fitting import Tokenizers, read_tokenizers
from vlmoe_core.train.folder import RunFolder

RUNS = Path("runs")


@dataclass(frozen=True)
class Trained:
    """A model as a checkpoint holds it, in evaluation mode on the CPU."""

    path: Path
    """The checkpoint folder."""
    step: int
    """Optimiser steps it was trained for."""
    recipe: Recipe
    """The recipe of its run."""
    tokenizers: Tokenizers
    """Its tokenizers."""
    objective: nn.Module
    """Encoder and heads."""


def load_trained(path: Path) -> Trained:
    """Read a run folder (its newest checkpoint) or a checkpoint folder.

    Raises:
        UsageError: there is no checkpoint.
        CheckpointError, TokenizerError: it is damaged or does not fit together.
    """
    checkpoint = read_checkpoint(resolve(path))
    recipe = load_recipe(str(checkpoint.path / "recipe.yaml")).recipe
    tokenizers = read_tokenizers(recipe, checkpoint.tokenizers)
    objective = build_objective(recipe, tokenizers.visual)
    load_model_state(objective, checkpoint.model)
    return Trained(checkpoint.path, checkpoint.state.step, recipe, tokenizers, objective.eval())


def newest_run(runs: Path = RUNS) -> Path:
    """The run under `runs` whose newest checkpoint was written last.

    Raises:
        UsageError: there is none; names the command that makes one.
    """
    newest = {run: latest_checkpoint(run) for run in runs.glob("*") if RunFolder(run).holds_run}
    found = {run: checkpoint.stat().st_mtime for run, checkpoint in newest.items() if checkpoint is not None}
    if not found:
        raise UsageError(
            f"no trained model under {runs}/; make one with 'vlmoe pretrain quickstart/pretrain' or give --model"
        )
    return max(found, key=lambda run: found[run])
