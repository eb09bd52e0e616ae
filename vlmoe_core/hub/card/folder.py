"""What a card is generated from: the files of a model folder and of the run that it is from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from vlmoe_core.checkpoint.layout import MANIFEST, RECIPE, STATE, latest_checkpoint
from vlmoe_core.checkpoint.names import layer_of
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.state import RunState, read_state
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hub.card.receipts import EXPORTED, IMPORTED, UPCYCLED, Exported, Imported, Upcycled, read_receipt
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.load import load_model_recipe
from vlmoe_core.train.results import StoredResult, read_results
from vlmoe_core.train.visual import trains_tokenizer

METRICS, ENVIRONMENT, REPORT, CONFIG = "metrics.jsonl", "environment.json", "report", "config.json"
FIGURES = tuple(f"{REPORT}/figures/{name}.png" for name in ("loads", "information", "entropy", "drops"))
"""The first that is there is shown."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Parameters:
    """Parameters of the tensors that are published."""

    total: int
    """All of them."""
    applied: int | None
    """Those that a token of each modality uses: of the experts of a layer only `top_k`; null: not known."""
    encoder_alone: bool
    """Heads are not counted."""


@dataclass(frozen=True)
class CardFolder:
    """The folders that are looked through, what is published first."""

    places: tuple[Path, ...]
    published: tuple[Path, ...]
    """Those whose files go along."""

    @classmethod
    def open(cls, folder: Path, beside: Sequence[Path] = (), along: Sequence[Path] = ()) -> "CardFolder":
        """The places of a run, a checkpoint, a model folder or an export.

        Args:
            folder: any of these.
            beside: where else its files lie.
            along: likewise, and what they hold is published too.

        Raises:
            UsageError: there is no recipe.
        """
        own = [*_with_run(folder), *along]
        places = [*own, *(place for one in beside if one not in own for place in _with_run(one))]
        found = cls(tuple(dict.fromkeys(places)), tuple(own))
        if found.find(RECIPE) is None:
            raise UsageError(f"{folder} has no {RECIPE}, so nothing is known for a card; give a run or a model folder")
        return found

    def find(self, name: str) -> Path | None:
        """The first file of that name."""
        return next((place / name for place in self.places if (place / name).is_file()), None)

    def publishes(self, name: str) -> bool:
        """Whether there is such a file that goes along."""
        return any((place / name).is_file() for place in self.published)

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file; nothing where there is none. Raises CheckpointError, naming it."""
        path = self.find(name)
        if path is None:
            return {}
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON; remove it, or take it from a copy") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} holds no JSON object; remove it, or take it from a copy")
        return found

    @cached_property
    def recipe(self) -> ModelRecipe:
        """Of the run that trained the model, or of an imported encoder."""
        path = self.find(RECIPE)
        assert path is not None
        return load_model_recipe(path)

    @property
    def run(self) -> Recipe | None:
        """The same, of a model that was trained."""
        return self.recipe if isinstance(self.recipe, Recipe) else None

    @property
    def task(self) -> str | None:
        """What the model was finetuned on."""
        return self.run.task.name if self.run is not None and self.run.task is not None else None

    @property
    def is_tokenizer(self) -> bool:
        """What was trained is a visual tokenizer."""
        return trains_tokenizer(self.recipe)

    @cached_property
    def state(self) -> RunState | None:
        """Where its run stood."""
        path = self.find(STATE)
        return None if path is None else read_state(path)

    @property
    def step(self) -> int | None:
        """Optimiser steps."""
        return None if self.state is None else self.state.step

    @cached_property
    def tensors(self) -> StoredTensors | None:
        """Of the model folder that is published, or that an export to another format was made of."""
        place = next((place for place in self.places if (place / MANIFEST).is_file()), None)
        return None if place is None else read_checkpoint(place).model

    @property
    def is_model_folder(self) -> bool:
        """What is published is a model folder, or a checkpoint."""
        return (self.places[0] / MANIFEST).is_file()

    @cached_property
    def imported(self) -> Imported | None:
        """The receipt of the import that this model is."""
        return read_receipt(self.find(IMPORTED), Imported)

    @cached_property
    def upcycled(self) -> Upcycled | None:
        """The receipt of the upcycling that this model is."""
        return read_receipt(self.find(UPCYCLED), Upcycled)

    @cached_property
    def exported(self) -> Exported | None:
        """The receipt of the export that is published."""
        return read_receipt(self.find(EXPORTED), Exported)

    @property
    def was_changed(self) -> bool:
        """The export does not compute what the model did that was trained and measured."""
        return self.exported is not None and self.exported.metric_before is not None

    @cached_property
    def results(self) -> list[StoredResult]:
        """What `vlmoe eval` measured."""
        return [result for place in self.places for result in read_results(place)]

    @cached_property
    def metrics(self) -> list[Line]:
        """The lines of metrics.jsonl up to the model's step; a last line that is not whole is none."""
        path = self.find(METRICS)
        if path is None:
            return []
        text = path.read_text(encoding="utf-8")
        try:
            lines: list[Line] = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            return [line for line in lines if self.step is None or line["step"] <= self.step]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} holds a line that is none of metrics; take it from a copy") from error

    @property
    def environment(self) -> dict[str, Any]:
        """Of the training: the one that lies beside the metrics. One beside an export tells of the export."""
        path = self.find(METRICS)
        if path is None or (path.parent / EXPORTED).is_file():
            return {}
        return CardFolder((path.parent,), ()).json(ENVIRONMENT)

    @property
    def figure(self) -> str | None:
        """The routing figure that is shown."""
        return next((name for name in FIGURES if self.publishes(name)), None)

    @property
    def parameters(self) -> Parameters:
        """Counted in the tensors, or told by the receipt of an export that has fewer; else from the recipe."""
        export = self.exported
        if export is not None and not self.is_model_folder and export.after != export.before:
            return Parameters(export.after.parameters, None, False)
        if self.tensors is not None:
            return _counted(self.tensors, self.recipe)
        if self.run is not None:
            return Parameters(self.run.num_params(), self.run.num_active_params(), self.task is not None)
        words = self.recipe.tokenizers.text.vocab_size
        return Parameters(self.recipe.model.num_params(words), self.recipe.model.num_active_params(words), True)


def _with_run(folder: Path) -> list[Path]:
    """A run's newest checkpoint before the run itself; behind a checkpoint of a run that run."""
    newest = latest_checkpoint(folder)
    if newest is not None:
        return [newest, folder]
    parent = folder.resolve().parent
    return [folder, parent.parent] if parent.name == "checkpoints" else [folder]


def _counted(tensors: StoredTensors, recipe: ModelRecipe) -> Parameters:
    """Ties count once; scales of quantised weights, the bias that balances a router and the codes of a tokenizer are no
    parameters."""
    sizes = {name: prod(tensors.shape(name)) for name in tensors if _is_parameter(name, tensors)}
    idle = 0
    for name, experts in tensors.experts().items():
        top_k = recipe.model.pools[_pool_of(name)].top_k
        idle += sizes.get(name, 0) // experts * max(0, experts - top_k)
    total = sum(sizes.values())
    return Parameters(total, total - idle, all(name.startswith("encoder.") for name in sizes))


def _is_parameter(name: str, tensors: StoredTensors) -> bool:
    return name not in tensors.tied and not name.endswith(".router.bias") and ".quantiser." not in name


def _pool_of(name: str) -> str:
    """The pool of `...ffn.POOL.experts...`."""
    return (layer_of(name) or "").rpartition(".")[2]
