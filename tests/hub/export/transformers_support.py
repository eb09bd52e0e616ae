"""Tiny models of every task with random weights, and real examples of theirs: the built-in scenes."""

from pathlib import Path

import torch

from tests.model.support import randomise
from tests.train.support import tiny
from tests.train.tasks_support import tuned
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Example
from vlmoe_core.data.stream import open_streams
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.fitting import obtain_tokenizers
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.trained import Trained


def trained_of(folder: Path, task: str, *overrides: str) -> Trained:
    """A model of a task, or of pretraining (`masked`), every parameter random."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = (tiny(folder, *overrides) if task == "masked" else tuned(folder, task, *overrides)).recipe
    tokenizers = obtain_tokenizers(recipe, folder / "tokenizers", Reporter())
    objective = build_objective(recipe, tokenizers.visual, tokenizers.labels)
    torch.manual_seed(7)
    randomise(objective)
    return Trained(folder, 0, recipe, tokenizers, objective.eval())


def examples_of(trained: Trained, number: int = 6) -> dict[StreamName, list[Example]]:
    """Held-out examples of each stream that the model knows."""
    recipe = trained.recipe
    streams = open_streams(recipe.data, recipe.data.eval, recipe.seed, trained.tokenizers.text)
    return {name: [stream[n] for n in range(number)] for name, stream in streams.items()}
