"""A finetuned model on a whole split: metrics with intervals, baselines, another model beside it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from accelerate import Accelerator

from vlmoe_core.data.config import SPLITS, DataConfig, SplitConfig, StreamName
from vlmoe_core.data.example import Example, Record
from vlmoe_core.data.loader import MicroBatch, MicroBatches, load_all
from vlmoe_core.errors import DataError, RecipeError, UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import read_recipe
from vlmoe_core.recipe.mistakes import validated
from vlmoe_core.tasks.baselines import Baseline as BaselineModel
from vlmoe_core.tasks.baselines import Majority, TextOnly
from vlmoe_core.tasks.kinds.retrieval import Matching, gallery_of, recall_scores, with_reranked
from vlmoe_core.tasks.metrics.intervals import paired_test
from vlmoe_core.tasks.task import Ranked, Scores, Task, open_task
from vlmoe_core.train.build import whole_dataset
from vlmoe_core.train.evaluate import Answers, evaluate
from vlmoe_core.train.fitting import records
from vlmoe_core.train.health import RouterHealth
from vlmoe_core.train.parallel import (
    from_main,
    gather_objects,
    meets_on_cpu,
    on_main,
    refuse_broken,
    started_processes,
)
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.reranking import joined, rerank
from vlmoe_core.train.trained import Trained

MOST_LEARNED = 100_000
"""Training examples that the baselines are fitted on, the first ones."""


@dataclass(frozen=True)
class Asked:
    """What a model is scored on."""

    data: DataConfig
    """The data; by default that of the model's recipe."""
    split: str
    """train, eval or test."""
    limit: int | None = None
    """At most so many examples; null: all."""


@dataclass(frozen=True)
class Evaluated:
    """What a model reaches. Of several processes the first alone has records, answers and scores."""

    records: Sequence[Record]
    """The examples."""
    answers: Sequence[Any]
    """What the model answers to each."""
    scores: Scores | None
    """The metrics; null where the truth is not known."""
    losses: Mapping[str, float]
    """Held-out losses and the routers' health."""
    broken: int
    """Examples that were skipped as broken."""


def ask(trained: Trained, data: str | None, split: str | None, limit: int | None, on_error: str | None) -> Asked:
    """What the command line asks for.

    Args:
        trained: the model.
        data: a recipe whose data is taken; null: the model's own.
        split: train, eval or test; null: test where there is one, else eval.
        limit: at most so many examples.
        on_error: raise or skip; null: as the data says.
    """
    assert trained.recipe.task is not None
    found = trained.recipe.data if data is None else data_of(data)
    if on_error is not None:
        if on_error not in ("raise", "skip"):
            raise UsageError(f"--on-error {on_error}: give raise or skip")
        found = found.model_copy(update={"on_error": on_error})
    return Asked(found, choose_split(found, (open_task(trained.recipe.task).stream,), split), limit)


def data_of(recipe: str) -> DataConfig:
    """The data of a recipe: a file, or a name of the catalogue. Raises UsageError, RecipeError."""
    read = read_recipe(recipe)
    data = read.tree.child("data")
    if data is None:
        raise RecipeError(f"{read.path} has no 'data'")
    return validated(DataConfig, data, str(read.path))


def choose_split(data: DataConfig, streams: Sequence[StreamName], wanted: str | None) -> str:
    """The split to read: the one that is wanted, else test, else eval, of those with sources of one of the streams.

    Raises UsageError where there is none of that name, or none at all.
    """
    where = f".{streams[0]}" if len(streams) == 1 else ""
    there = [name for name in reversed(SPLITS) if any(getattr(getattr(data, name), stream) for stream in streams)]
    if wanted is not None and wanted not in there:
        raise UsageError(
            f"--split {wanted}: data.{wanted}{where} has no source; these have: {', '.join(there) or 'none'}"
        )
    held_out = [name for name in there if name != "train"]
    if wanted is None and not held_out:
        raise UsageError(f"the recipe has no data.test{where} and no data.eval{where}; give --data")
    return wanted or held_out[0]


def answer_all(trained: Trained, asked: Asked, accelerator: Accelerator, reporter: Reporter) -> Evaluated:
    """Let a model answer every example of a split; the processes share them.

    Without a capacity in evaluation the answers don't depend on how the examples are cut into batches.

    Raises DataError for a broken example where `data.on_error` is `raise`.
    """
    recipe = trained.recipe.model_copy(update={"data": prepared_as(trained.recipe.data, asked.data)})
    assert recipe.task is not None
    task = open_task(recipe.task)
    dataset = whole_dataset(recipe, split_of(asked), trained.tokenizers, asked.limit)
    for pool, moe in recipe.model.pools.items():
        if moe.eval_capacity_factor is not None:
            reporter.note(
                f"{pool} experts have a capacity in evaluation (factor {moe.eval_capacity_factor}): the answers depend "
                "on how the examples are cut into batches"
            )
    share = _Share(dataset, task.stream, accelerator.process_index, accelerator.num_processes)
    objective = trained.objective.to(accelerator.device)
    answers = Answers(task, trained.tokenizers.labels)
    broken: list[str] = []
    micros = _told(share.micros(recipe.data), len(share.numbers), broken, reporter)
    losses = evaluate(objective, micros, accelerator.device, RouterHealth(), answers)
    if recipe.data.on_error == "raise":
        refuse_broken(broken)
    found, said = answers.gather()
    scores = on_main(partial(_scored, task, found, said, asked.split))
    if isinstance(objective, Matching) and objective.config.itm_weight and objective.config.rerank:
        reporter.note(f"ranking the best {objective.config.rerank} of each query anew")
        gallery = from_main(gallery_of(found, said) if accelerator.is_main_process else None)
        pairs = joined(_Share(dataset, task.stream, 0, 1).micros(recipe.data), len(gallery.image_ND))
        ranks = rerank(objective, gallery, pairs, dataset.sizes[task.stream], share.rank, share.ranks)
        scores = with_reranked(recall_scores(ranks, gallery), scores) if accelerator.is_main_process else None
    return Evaluated(found, said, scores, losses, sum(gather_objects(len(broken))))


def _scored(task: Task, records: Sequence[Record], answers: Sequence[Any], split: str) -> Scores | None:
    """The metrics; null where the truth is hidden. Raises DataError if there is no example."""
    if not records:
        raise DataError(f"data.{split} has no readable example")
    return task.score(records, answers) if task.can_score(records) else None


def prepared_as(own: DataConfig, asked: DataConfig) -> DataConfig:
    """The data that is asked for, its texts cut and padded as the model is used to."""
    return asked.model_copy(update={"max_text": own.max_text, "pad_text_to": own.pad_text_to})


@dataclass(frozen=True)
class _Share:
    """The micro-batches of a split that one of several processes computes."""

    dataset: MicroBatches
    stream: StreamName
    rank: int
    ranks: int

    @property
    def numbers(self) -> range:
        """At least one, which may be empty."""
        total = -(-(self.dataset.limit or 0) // self.dataset.sizes[self.stream])
        return range(self.rank, max(total, self.ranks), self.ranks)

    def micros(self, data: DataConfig) -> Iterator[MicroBatch]:
        """The micro-batches, in order."""
        return load_all(self.dataset, self.numbers, data, started_processes("LOCAL_WORLD_SIZE"))


def _told(micros: Iterable[MicroBatch], count: int, broken: list[str], reporter: Reporter) -> Iterator[MicroBatch]:
    """The same micro-batches; tells how many are done, and adds the messages of broken examples to `broken`."""
    reporter.counted(count)
    for done, micro in enumerate(micros, start=1):
        broken.extend(micro.broken)
        yield micro
        reporter.advanced(done)


def split_of(asked: Asked) -> SplitConfig:
    """The sources of the split."""
    split: SplitConfig = getattr(asked.data, asked.split)
    return split


@dataclass(frozen=True)
class Baseline:
    """What a predictor without pictures reaches."""

    name: str
    """majority, or what the task calls the one that sees the text."""
    scores: Scores
    """Its metrics on the same examples."""


def baselines(recipe: Recipe, evaluated: Evaluated) -> list[Baseline]:
    """The best constant answer and the best answer from the text alone, both fitted on `data.train`.

    Raises DataError where the training data can't be opened.
    """
    assert recipe.task is not None
    task = open_task(recipe.task)
    examples = islice(records(recipe, recipe.data.train), MOST_LEARNED)
    learned = [(_text_of(task, e), truth) for e in examples if (truth := task.truth(e))]
    if not learned:
        return []
    texts, truths = [text for text, _ in learned], [truth for _, truth in learned]
    asked = [_text_of(task, r) for r in evaluated.records]
    fitted: dict[str, BaselineModel] = {"majority": Majority.fit(texts, truths)}
    if task.blind:
        fitted[task.blind] = TextOnly.fit(texts, truths)
    return [
        Baseline(name, task.score(evaluated.records, [Ranked((model.predict(text),), (1.0,)) for text in asked]))
        for name, model in fitted.items()
    ]


def _text_of(task: Task, example: Example | Record) -> str:
    """What a baseline may read: a question, a statement, a hypothesis."""
    return (example.second_text if task.stream == "text" else example.words) or ""


def comparison(task: Task, first: Evaluated, second: Evaluated, other: Trained) -> dict[str, Any]:
    """A paired test of two models on the same examples, in percentage points: the first less the other.

    Raises UsageError where they answered different examples.
    """
    if [r.name for r in first.records] != [r.name for r in second.records]:
        raise UsageError("the two models answered different examples; give both the same --data, --split and --limit")
    assert first.scores is not None
    assert second.scores is not None
    a, b = first.scores.metrics[task.tested], second.scores.metrics[task.tested]
    found = paired_test(a.values, b.values, a.groups)
    low, high = found.interval
    return {
        "other": other.name,
        "metric": task.tested,
        "other_percent": b.percent,
        "difference": 100 * found.difference,
        "interval": (100 * low, 100 * high),
        "p_value": found.p_value,
    }


def report(
    task: Task, trained: Trained, asked: Asked, evaluated: Evaluated, found: Sequence[Baseline]
) -> dict[str, Any]:
    """What `vlmoe eval --json` prints; accuracies and recalls in percent."""
    scores = evaluated.scores
    assert scores is not None, "only what has a truth is reported"
    return {
        "task": trained.recipe.task.name if trained.recipe.task else "",
        "model": trained.name,
        "split": asked.split,
        "n": len(evaluated.records),
        "metrics": scores.percents(),
        "intervals": scores.intervals(),
        "baselines": {one.name: one.scores.percents() for one in found}
        | ({"chance": dict(chance)} if (chance := task.chance(evaluated.records)) else {}),
        "baseline_intervals": {one.name: one.scores.intervals() for one in found},
        "broken": evaluated.broken,
    }


def accelerator_of() -> Accelerator:
    """The process's place among those that score together."""
    return Accelerator(cpu=meets_on_cpu())
