"""A trained model, read back from its run alone: recipe, tokenizers and weights lie in its checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vlmoe_core.checkpoint.layout import RECIPE, latest_checkpoint, step_of
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.restore import load_model_state
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.hf import shown
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import load_model_recipe, load_recipe
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.fitting import Tokenizers, read_tokenizers
from vlmoe_core.train.folder import RunFolder
from vlmoe_core.train.visual import refuse_tokenizer, trains_tokenizer

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

    @property
    def name(self) -> str:
        """Its folder as a person knows it; of a model that was fetched its name on the Hub."""
        return shown(self.path)


def load_trained(path: Path) -> Trained:
    """Read a run folder (its newest checkpoint), a checkpoint or model folder, or hf-hub:ORG/NAME[@REVISION].

    Raises:
        UsageError: there is no checkpoint, or only an encoder.
        HubError: the Hub does not give it.
        CheckpointError, TokenizerError: it is damaged or does not fit together.
    """
    checkpoint = read_checkpoint(resolve(path))
    recipe = load_model_recipe(checkpoint.path / RECIPE)
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"{path} holds an encoder alone, without heads: it was imported; train on from it with --model {path}"
        )
    tokenizers = read_tokenizers(recipe, checkpoint.tokenizers)
    objective = build_objective(recipe, tokenizers.visual, tokenizers.labels)
    load_model_state(objective, checkpoint.model)
    return Trained(checkpoint.path, checkpoint.state.step, recipe, tokenizers, objective.eval())


def load_finetuned(path: Path, task: str) -> Trained:
    """The same of a model that was finetuned on a task. Raises UsageError for any other."""
    trained = load_trained(path)
    found = trained.recipe.task
    refuse_tokenizer(trained.recipe, str(path))
    if found is None or found.name != task:
        was = "pretrained, not finetuned" if found is None else f"finetuned on {found.name}"
        raise UsageError(f"{path} was {was}; to use it on {task}: vlmoe finetune RECIPE --model {path}")
    return trained


def newest_run(runs: Path = RUNS) -> Path:
    """The run under `runs` that finished last.

    Raises:
        UsageError: there is none; names the command that makes one.
    """
    return _newest(runs, lambda recipe: True, "is there; make one with 'vlmoe pretrain quickstart/pretrain'")


def newest_pretrained(stream: StreamName, runs: Path = RUNS) -> Path:
    """The run under `runs` that finished last and was pretrained on a stream.

    Raises:
        UsageError: there is none; names the command that makes one.
    """
    return _newest(
        runs,
        lambda recipe: recipe.task is None and not trains_tokenizer(recipe) and recipe.batch.size.of(stream) > 0,
        f"was pretrained on the {stream} stream; make one with 'vlmoe pretrain quickstart/pretrain'",
    )


def newest_sparse(runs: Path = RUNS) -> Path:
    """The run under `runs` that finished last and has sparse layers; errors likewise."""
    return _newest(
        runs,
        lambda recipe: bool(recipe.model.pools),
        "has experts; make one with 'vlmoe pretrain quickstart/pretrain'",
    )


def newest_finetuned(task: str, runs: Path = RUNS) -> Path:
    """The run under `runs` that finished last and was finetuned on a task; errors likewise."""
    return _newest(
        runs,
        lambda recipe: recipe.task is not None and recipe.task.name == task,
        f"was finetuned on {task}; make one with 'vlmoe finetune quickstart/{task}'",
    )


def _newest(runs: Path, fits: Callable[[Recipe], bool], wanted: str) -> Path:
    folders = [RunFolder(run) for pattern in ("*", "*/seed-*") for run in runs.glob(pattern)]
    found = {folder.path: folder.metrics.stat().st_mtime for folder in folders if _finished(folder, fits)}
    if not found:
        raise UsageError(f"no finished run under {runs}/ {wanted}, or give --model")
    return max(found, key=lambda run: found[run])


def _finished(folder: RunFolder, fits: Callable[[Recipe], bool]) -> bool:
    checkpoint = latest_checkpoint(folder.path) if folder.holds_run else None
    if checkpoint is None:
        return False
    recipe = load_recipe(str(folder.recipe)).recipe
    return step_of(checkpoint) == recipe.train.steps and fits(recipe)
