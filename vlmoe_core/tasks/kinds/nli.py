"""Does a premise entail a hypothesis, contradict it, or neither (MNLI, SNLI, SICK)?"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmoe_core.data.example import Example, Record
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tasks.config import TaskConfig
from vlmoe_core.tasks.heads import TextPool, sentence_head
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.objective import Choosing, cross_entropy
from vlmoe_core.tasks.task import (
    Ranked,
    Scores,
    Task,
    Values,
    by_fact,
    label_hits,
    label_target,
    rank,
    required,
    write_text,
)

LABELS = Labels(("entailment", "neutral", "contradiction"))


class Config(TaskConfig):
    """Pairs of sentences."""

    name: Literal["nli"] = "nli"
    """Natural-language inference."""
    pool: TextPool = "text"
    """[CLS], or what either sentence's mean, their difference and product tell (stronger where data are few)."""


class NLI(Task):
    """Premise and hypothesis as one text, [SEP] between them; accuracy."""

    stream = "text"
    inputs = ("text",)
    best = "accuracy"
    tested = "accuracy"
    known_labels = LABELS
    blind = "hypothesis-only"

    def __init__(self, config: Config) -> None:
        self.config = config

    def find_labels(self, train: Iterable[Example], held_out: Iterable[Example]) -> Labels:
        """The three, in GLUE's order."""
        return LABELS

    def target(self, example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
        """() int64, the number of the label."""
        return label_target(example, labels, training)

    def stand_in(self, noise: Example, labels: Labels, rng: random.Random) -> Example:
        """The text stands for the hypothesis too."""
        return replace(super().stand_in(noise, labels, rng), second_text=noise.text)

    def build(self, encoder: Encoder, labels: Labels) -> nn.Module:
        """Pooler and a linear map (BERT, arXiv 1810.04805)."""
        which = self.config.pool
        head = sentence_head(which, encoder.config.dim, len(labels.names))
        return Choosing("nli", "text", encoder, which, head, cross_entropy)

    def read(self, outputs_XF: Tensor, labels: Labels) -> list[Ranked]:
        """The labels with their probabilities."""
        return rank(outputs_XF, labels)

    def score(self, records: Sequence[Record], answers: Sequence[Ranked]) -> Scores:
        """Accuracy, of all and of each subset (matched, mismatched)."""
        accuracy = Values(label_hits(records, answers))
        return Scores({"accuracy": accuracy} | by_fact("accuracy", accuracy, records, "subset"))

    def write_submission(self, records: Sequence[Record], answers: Sequence[Ranked], path: Path) -> None:
        """The tsv that GLUE's server takes.

        It wants a file for each set, whose numbers begin anew: of several subsets each has one, named in front of the
        suffix (preds.tsv: preds-matched.tsv, preds-mismatched.tsv).
        """
        lines: dict[str, list[str]] = {}
        for record, answer in zip(records, answers, strict=True):
            subset = str(record.facts.get("subset", ""))
            lines.setdefault(subset, ["index\tprediction\n"]).append(f"{required(record, 'id')}\t{answer.labels[0]}\n")
        for subset, own in lines.items():
            write_text(path.with_stem(f"{path.stem}-{subset}") if subset and len(lines) > 1 else path, "".join(own))


def open_task(config: Config) -> NLI:
    """The task."""
    return NLI(config)
