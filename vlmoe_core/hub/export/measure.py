"""What a model reaches on its own held-out data, before and after an export changed it."""

from dataclasses import dataclass

from vlmoe_core.data.loader import load
from vlmoe_core.errors import DataError
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import build_dataset
from vlmoe_core.train.evaluate import evaluate
from vlmoe_core.train.health import RouterHealth
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.scoring import accelerator_of, answer_all, ask
from vlmoe_core.train.trained import Trained


@dataclass(frozen=True)
class Measured:
    """One number of a model."""

    name: str
    """Of the metric or loss."""
    value: float
    """Percent of a metric, nats of a loss."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval of a metric."""
    examples: int
    """On how many examples."""
    split: str
    """Of which split of the model's data."""


def measure(trained: Trained, limit: int) -> Measured:
    """The metric of a finetuned model's task, or the held-out loss of a pretrained one.

    Args:
        trained: the model.
        limit: at most so many examples.

    Raises DataError, UsageError where there are none.
    """
    return _loss(trained, limit) if trained.recipe.task is None else _metric(trained, limit)


def _metric(trained: Trained, limit: int) -> Measured:
    assert trained.recipe.task is not None
    task, asked = open_task(trained.recipe.task), ask(trained, None, None, limit, None)
    evaluated = answer_all(trained, asked, accelerator_of(), Reporter())
    if evaluated.scores is None:
        raise DataError(f"data.{asked.split} does not hold the truth, on which the export is measured; name other data")
    found = evaluated.scores.metrics[task.tested]
    return Measured(task.tested, found.percent, found.interval(), len(evaluated.records), asked.split)


def _loss(trained: Trained, limit: int) -> Measured:
    recipe = trained.recipe
    within = recipe.model_copy(update={"train": recipe.train.model_copy(update={"eval_examples": limit})})
    dataset = build_dataset(within, recipe.data.eval, trained.tokenizers, training=False)
    here = recipe.data.model_copy(update={"workers": 0})
    micros = list(load(dataset, range(dataset.num_micros), here))
    device = next(trained.objective.parameters()).device
    found = evaluate(trained.objective, micros, device, RouterHealth())
    examples = sum(batch.num_examples for micro in micros for batch in micro.batches.values())
    return Measured("held-out loss", found["loss/total"], None, examples, "eval")
