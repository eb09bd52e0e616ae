"""What `vlmoe route-stats` is asked for: a model with a capacity, the examples to route, and what they count as."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlmoe_core.analysis.routing.trace import PRETRAINING_TASKS
from vlmoe_core.config import Config, nearest
from vlmoe_core.data.config import STREAMS, DataConfig, StreamName, TextLengthConfig
from vlmoe_core.data.loader import MicroBatches
from vlmoe_core.errors import RecipeError, UsageError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.objectives.config import MaskConfig
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import read_recipe
from vlmoe_core.recipe.mistakes import validated
from vlmoe_core.recipe.tree import Node
from vlmoe_core.tasks.config import Task
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import build_dataset, build_objective, whole_dataset
from vlmoe_core.train.config import BatchConfig
from vlmoe_core.train.fitting import obtain_labels
from vlmoe_core.train.scoring import choose_split
from vlmoe_core.train.trained import Trained

MAX_FACTOR = 1_000_000
"""Far beyond the number of experts, at which nothing is dropped any more."""


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    data: str | None = None
    """A recipe or a run folder whose data is routed; null: the model's own."""
    split: str | None = None
    """train, eval or test; null: test where there is one, else eval."""
    tasks: tuple[str, ...] = ()
    """What is counted: mlm, mim, vlm, or the data's task; empty: all."""
    limit: int | None = None
    """At most so many examples of each stream; null: as many as the recipe evaluates on."""
    capacity: str = "train"
    """train, eval, dropless, or a factor."""


@dataclass(frozen=True)
class Request:
    """A model, and what is to be routed by it."""

    trained: Trained
    """The model, its capacity in evaluation set to the one that is asked for."""
    recipe: Recipe
    """Its recipe, with the data, masks and micro-batches that are asked for."""
    data: str
    """Whose data it is, in words."""
    split: str
    """train, eval or test."""
    tasks: Mapping[StreamName, str]
    """What the streams that the encoder is run on are counted as."""
    limit: int
    """At most so many examples of each stream."""
    capacity: Mapping[str, str]
    """Of each pool, in words."""
    labels: Labels
    """What targets are numbers of, where the data are a task's."""


class _DataParts(Config):
    """The parts of a recipe that say what is read."""

    data: DataConfig
    """Sources."""
    task: Task | None = None
    """What is finetuned."""
    batch: BatchConfig
    """The size of a routing group."""
    mask: MaskConfig = MaskConfig()
    """What is hidden."""


def make_request(trained: Trained, asked: Asked) -> Request:
    """What the command line asks for, checked.

    Raises UsageError for a split, task or capacity that there is not, RecipeError for a recipe that can't be read.
    """
    recipe, data = (trained.recipe, "its own recipe") if asked.data is None else _with_data(trained.recipe, asked.data)
    tasks = _chosen(tasks_of(recipe), asked.tasks)
    streams = (open_task(recipe.task).stream,) if recipe.task else tuple(tasks)
    return Request(
        trained=with_capacity(trained, asked.capacity),
        recipe=recipe,
        data=data,
        split=choose_split(recipe.data, streams, asked.split),
        tasks=tasks,
        limit=asked.limit or recipe.train.eval_examples,
        capacity=capacity_words(trained.recipe.model, asked.capacity),
        labels=_labels(recipe, trained),
    )


def _labels(recipe: Recipe, trained: Trained) -> Labels:
    """The model's own for its own task, else those that the data have."""
    own = trained.recipe.task is not None and recipe.task is not None and trained.recipe.task.name == recipe.task.name
    return trained.tokenizers.labels if own else obtain_labels(recipe)


def _with_data(own: Recipe, named: str) -> tuple[Recipe, str]:
    """The recipe with the data, task, micro-batches and masks of another one; texts are cut as the model is used to."""
    in_run = Path(named) / "recipe.yaml"
    read = read_recipe(str(in_run) if in_run.is_file() else named)
    fields = {key: child for key in _DataParts.model_fields if (child := read.tree.child(key)) is not None}
    if "data" not in fields:
        raise RecipeError(f"{read.path} has no 'data'")
    parts = validated(_DataParts, Node(fields, read.tree.place), str(read.path))
    data = parts.data.model_copy(update={"max_text": _fitting(own), "pad_text_to": own.data.pad_text_to})
    objective = None if parts.task else own.objective
    changed = {"data": data, "task": parts.task, "batch": parts.batch, "mask": parts.mask, "objective": objective}
    # The report may be published, and then holds no path of this machine.
    return own.model_copy(update=changed), Path(named).name if Path(named).exists() else named


def _fitting(own: Recipe) -> TextLengthConfig:
    """The longest texts that the model is used to, none longer than it has positions."""
    longest = own.model.max_text_length
    given = own.data.max_text
    return TextLengthConfig(text=min(given.text, longest), pair=min(given.pair, longest))


def tasks_of(recipe: Recipe) -> dict[StreamName, str]:
    """What each stream that the encoder is run on counts as."""
    if recipe.task is None:
        return dict(PRETRAINING_TASKS)
    inputs = open_task(recipe.task).inputs
    name = recipe.task.name
    return {stream: name if len(inputs) == 1 else f"{name} {stream}" for stream in inputs}


def _chosen(tasks: Mapping[StreamName, str], wanted: Sequence[str]) -> dict[StreamName, str]:
    for name in wanted:
        if name not in tasks.values():
            raise UsageError(f"--tasks {name}: this data has no such task; {nearest(name, list(tasks.values()))}")
    return {stream: task for stream, task in tasks.items() if not wanted or task in wanted}


def dataset_of(request: Request) -> MicroBatches:
    """The examples, in groups of the recipe's `batch.micro`, each with its record."""
    recipe, trained = request.recipe, request.trained
    split = getattr(recipe.data, request.split)
    if recipe.task is not None:
        tokenizers = replace(trained.tokenizers, labels=request.labels)
        return whole_dataset(recipe, split, tokenizers, request.limit)
    unread = {stream: () for stream in STREAMS if stream not in request.tasks}
    dataset = build_dataset(recipe, split.model_copy(update=unread), trained.tokenizers, training=False)
    return replace(dataset, limit=request.limit, recorded=True)


def with_capacity(trained: Trained, capacity: str) -> Trained:
    """The same model with that capacity in evaluation: its own of training or evaluation, none, or a factor."""
    moe = trained.recipe.model.moe
    pools = {pool: _with_factor(own, capacity) for pool, own in trained.recipe.model.pools.items()}
    model = trained.recipe.model.model_copy(update={"moe": moe.model_copy(update=pools)})
    recipe = trained.recipe.model_copy(update={"model": model})
    objective = build_objective(recipe, trained.tokenizers.visual, trained.tokenizers.labels)
    objective.load_state_dict(trained.objective.state_dict())
    return replace(trained, recipe=recipe, objective=objective.eval())


def _with_factor(moe: MoEConfig, capacity: str) -> MoEConfig:
    return moe.model_copy(update={"eval_capacity_factor": _factor(moe, capacity)})


def _factor(moe: MoEConfig, capacity: str) -> float | None:
    """Raises UsageError for a word that is no capacity."""
    known = {"train": moe.capacity_factor, "eval": moe.eval_capacity_factor, "dropless": None}
    if capacity in known:
        return known[capacity]
    try:
        factor = float(capacity)
    except ValueError:
        factor = 0.0
    if not 0 < factor <= MAX_FACTOR:
        raise UsageError(
            f"--capacity {capacity}: give train, eval, dropless, or a factor above 0, at most {MAX_FACTOR}"
        )
    return factor


def capacity_words(model: ModelConfig, capacity: str) -> dict[str, str]:
    """The capacity of each pool, and where it comes from."""
    source = {"train": " (training)", "eval": " (evaluation)"}.get(capacity, "")
    factors = {pool: _factor(moe, capacity) for pool, moe in model.pools.items()}
    return {pool: ("dropless" if f is None else f"{f:g}") + source for pool, f in factors.items()}
