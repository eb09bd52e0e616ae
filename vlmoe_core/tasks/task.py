"""What a downstream task is: its labels, its target, its head and loss, its score, its submission file."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmoe_core.config import nearest, plugin_module, plugin_names
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Example, Record
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tasks.config import ALIASES, TASKS, TaskConfig
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.metrics.intervals import bootstrap, bootstrap_sum
from vlmoe_core.tasks.metrics.labels import hits

MOST_RANKED = 5
"""Labels that are kept of each example, the most probable ones."""


@dataclass(frozen=True)
class Ranked:
    """What a model answers to one example."""

    labels: tuple[str, ...]
    """The most probable labels, the best first."""
    probabilities: tuple[float, ...]
    """Theirs."""
    num_labels: int = 0
    """How many labels there were to choose from."""


@dataclass(frozen=True)
class Values:
    """One metric, example by example."""

    values: NDArray[np.float64]
    """(N,) from 0 to 1; their mean is the metric."""
    groups: NDArray[np.int64] | None = None
    """(N,) values of the same group are drawn together for the interval; null: each is drawn alone."""

    @property
    def percent(self) -> float:
        """The metric, in percent."""
        return 100 * float(self.values.mean())

    def interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval, in percent."""
        low, high = bootstrap(self.values, groups=self.groups)
        return 100 * low, 100 * high

    @property
    def drawn_together(self) -> NDArray[np.int64]:
        """(N,) the groups; where each is drawn alone, its number."""
        return np.arange(len(self.values)) if self.groups is None else self.groups

    def part(self, chosen_N: NDArray[np.bool_]) -> "Values":
        """The metric on some of the examples."""
        return Values(self.values[chosen_N], None if self.groups is None else self.groups[chosen_N])


@dataclass(frozen=True)
class Scores:
    """What a model reaches on a split."""

    metrics: Mapping[str, Values]
    """By name."""
    totals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sums and means over other metrics: name -> their names; `rsum` is a sum, others are means."""

    def percents(self) -> dict[str, float]:
        """Every metric and total, in percent."""
        found = {name: values.percent for name, values in self.metrics.items()}
        for name, parts in self.totals.items():
            total = sum(found[part] for part in parts)
            found[name] = total * _share(name, parts)
        return found

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % bootstrap interval of every metric and total, in percent."""
        found = {name: values.interval() for name, values in self.metrics.items()}
        for name, parts in self.totals.items():
            values = [self.metrics[part] for part in parts]
            low, high = bootstrap_sum([v.values for v in values], [v.drawn_together for v in values])
            found[name] = 100 * low * _share(name, parts), 100 * high * _share(name, parts)
        return found


def _share(total: str, parts: Sequence[str]) -> float:
    """What a total's parts count for: `rsum` is their sum, others are means."""
    return 1 if total == "rsum" else 1 / len(parts)


class Task(ABC):
    """A downstream task. Each file in tasks/kinds has one, as `open_task(config)`."""

    stream: ClassVar[StreamName]
    """The stream of its examples."""
    inputs: tuple[StreamName, ...]
    """What the encoder is run on; parameters that none of it meets are frozen."""
    best: ClassVar[str]
    """The metric that chooses the best checkpoint; higher is better."""
    tested: ClassVar[str]
    """The metric by which two models are compared example by example."""
    known_labels: ClassVar[Labels | None] = None
    """The labels of the head, where the task and not the data decide on them."""
    blind: ClassVar[str | None] = None
    """What the baseline that sees the text alone is called; null: the task has none."""
    has_server: ClassVar[bool] = True
    """There is a public server for submissions."""
    needs_whole_batch: ClassVar[bool] = False
    """The loss compares the examples of a step with each other, so that accumulation would change it."""

    @abstractmethod
    def find_labels(self, train: Iterable[Example], held_out: Iterable[Example]) -> Labels:
        """The labels of the head, from the records of the training and of the held-out data."""

    @abstractmethod
    def target(self, example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
        """What the model must predict; null: the example does not tell.

        Raises DataError, without a name, for a label that is not in the list.
        """

    def check_pictures(self, example: Example) -> None:
        """Raises DataError, without a name, where an example has another number of pictures than the head takes."""
        if example.more_images:
            raise DataError(f"has {1 + len(example.more_images)} pictures, the head takes 1; leave the others away")

    def checked_target(self, example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
        """`target`, of an example that the head can take; errors of both."""
        self.check_pictures(example)
        return self.target(example, labels, training)

    @abstractmethod
    def build(self, encoder: Encoder, labels: Labels) -> nn.Module:
        """The objective: encoder, head and loss. Its `outputs` are what `read` reads."""

    @abstractmethod
    def read(self, outputs_XF: Tensor, labels: Labels) -> list[Any]:
        """What the model answers to each example, small enough to be gathered."""

    @abstractmethod
    def score(self, records: Sequence[Record], answers: Sequence[Any]) -> Scores:
        """The metrics. Raises DataError, naming an example, where the truth is not known."""

    @abstractmethod
    def write_submission(self, records: Sequence[Record], answers: Sequence[Any], path: Path) -> None:
        """Write the answers as the task's public server takes them."""

    def can_score(self, records: Sequence[Record]) -> bool:
        """Whether the truth is known. Raises DataError, naming an example, where it is known of some alone."""
        silent = [r for r in records if not any(key in r.facts for key in ("label", "answers", "scores"))]
        if 0 < len(silent) < len(records):
            raise DataError(
                f"{silent[0].name}: its truth is hidden, as that of {len(silent)} of the {len(records)} examples, but "
                "not of the others; give the two kinds splits of their own"
            )
        return not silent

    def stand_in(self, noise: Example, labels: Labels, rng: random.Random) -> Example:
        """A random example with what `target` reads, for a trial that opens no data."""
        return replace(noise, facts={"label": rng.choice(labels.names)})

    def truth(self, example: Example | Record) -> str | None:
        """The label that a baseline learns from an example; null: none."""
        return example.facts.get("label")

    def chance(self, records: Sequence[Record]) -> Mapping[str, float]:
        """What guessing at random reaches, in percent, by metric; for tasks whose labels have no majority."""
        return {}


def open_task(config: TaskConfig) -> Task:
    """The task that a config names."""
    task: Task = plugin_module(TASKS, config.name).open_task(config)
    return task


def named_task(word: str) -> str:
    """The task that a word means, an alias or a name. Raises UsageError for any other word."""
    name, known = ALIASES.get(word, word), plugin_names(TASKS)
    if name not in known:
        raise UsageError(f"no task '{word}'; {nearest(word, [*known, *ALIASES])}")
    return name


def rank(
    logits_XA: Tensor, labels: Labels, probabilities: Callable[[Tensor], Tensor] = partial(torch.softmax, dim=-1)
) -> list[Ranked]:
    """The labels of the highest logits of each example. Large logits differ where their float32 sigmoids don't."""
    logits_XA = logits_XA.float()
    numbers_XK = logits_XA.topk(min(MOST_RANKED, len(labels.names))).indices
    values_XK = probabilities(logits_XA).gather(1, numbers_XK)
    return [
        Ranked(tuple(labels.names[i] for i in numbers), tuple(values), len(labels.names))
        for numbers, values in zip(numbers_XK.tolist(), values_XK.tolist(), strict=True)
    ]


def label_target(example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
    """() int64, the number of the example's label; null where it is hidden.

    Raises DataError, without a name, for a label that is not in the list, and where training would need a hidden one.
    """
    label = example.facts.get("label")
    if label is None and training:
        raise DataError("has no label, which training needs")
    return None if label is None else np.array(labels.number(label))


def label_hits(records: Sequence[Record], answers: Sequence[Ranked], k: int = 1) -> NDArray[np.float64]:
    """(N,) 1 where the label is among the k most probable ones, else 0.

    Raises DataError, naming an example, where the label is hidden.
    """
    return hits([a.labels for a in answers], [required(r, "label") for r in records], k)


def by_fact(prefix: str, values: Values, records: Sequence[Record], key: str) -> dict[str, Values]:
    """A metric on the examples of each value of a fact, as prefix/value; those without the fact are in none."""
    found = np.array([str(r.facts.get(key, "")) for r in records])
    return {f"{prefix}/{one}": values.part(found == one) for one in sorted(set(found.tolist()) - {""})}


def picture_groups(records: Sequence[Record]) -> NDArray[np.int64]:
    """(N,) the same number for examples of the same picture."""
    return np.array([r.image_id for r in records], dtype=np.int64)


def required(record: Record, key: str) -> Any:
    """A fact of an example. Raises DataError, naming the example, where it is hidden."""
    if key not in record.facts:
        raise DataError(
            f"{record.name}: holds no '{key}', so it can't be scored; --submission FILE writes the answers for the "
            "task's server instead"
        )
    return record.facts[key]


def write_text(path: Path, text: str) -> None:
    """Write a submission file. Raises UsageError if that can't be done."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the submission can't be written to {path}: {error.strerror}; choose another file") from error
