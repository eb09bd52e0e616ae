"""Image classification (ImageNet)."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from vlmoe_core.data.example import Example, Record
from vlmoe_core.errors import DataError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tasks.config import TaskConfig
from vlmoe_core.tasks.heads import class_head
from vlmoe_core.tasks.labels import Labels, sorted_labels
from vlmoe_core.tasks.mixing import Mixing
from vlmoe_core.tasks.objective import Choosing, cross_entropy
from vlmoe_core.tasks.task import MOST_RANKED, Ranked, Scores, Task, Values, label_hits, label_target, rank, write_text


class Config(TaskConfig):
    """Pictures with one label each."""

    name: Literal["classification"] = "classification"
    """Image classification."""
    pool: Literal["mean", "image"] = "mean"
    """Which final states the head reads: the mean of the patches (VL-MoE, BEiT-3), or [CLS]."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all labels (BEiT-3: 0.1)."""
    mixup: float = Field(0.0, ge=0)
    """alpha of mixup (arXiv 1710.09412); 0: none (BEiT-3: 0.8)."""
    cutmix: float = Field(0.0, ge=0)
    """alpha of cutmix (arXiv 1905.04899); 0: none (BEiT-3: 1.0). With both, each batch draws one of them."""


class Classification(Task):
    """A linear map of the mean patch state; top-1 and top-5 accuracy."""

    stream = "image"
    inputs = ("image",)
    best = "top1"
    tested = "top1"

    def __init__(self, config: Config) -> None:
        self.config = config

    def find_labels(self, train: Iterable[Example], held_out: Iterable[Example]) -> Labels:
        """The labels of the training pictures, in alphabetical order. Raises DataError where there are none."""
        labels = sorted_labels(e.facts["label"] for e in train if "label" in e.facts)
        if not labels.names:
            raise DataError("no picture of data.train.image has a label; classes are folders: CLASS/NAME.jpg")
        return labels

    def target(self, example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
        """() int64, the number of the label."""
        return label_target(example, labels, training)

    def build(self, encoder: Encoder, labels: Labels) -> nn.Module:
        """A linear map (VL-MoE: average of the final states, then linear)."""
        config, classes = self.config, len(labels.names)
        mixing = Mixing(config.mixup, config.cutmix, config.label_smoothing, classes)
        head = class_head(encoder.config.dim, classes)
        change = mixing if config.mixup or config.cutmix or config.label_smoothing else None
        return Choosing("classification", "image", encoder, config.pool, head, cross_entropy, change=change)

    def read(self, outputs_XF: Tensor, labels: Labels) -> list[Ranked]:
        """The most probable labels."""
        return rank(outputs_XF, labels)

    def score(self, records: Sequence[Record], answers: Sequence[Ranked]) -> Scores:
        """Top-1 accuracy, and top-5 where there are more labels."""
        metrics = {"top1": Values(label_hits(records, answers))}
        if answers[0].num_labels > MOST_RANKED:
            metrics["top5"] = Values(label_hits(records, answers, MOST_RANKED))
        return Scores(metrics)

    def write_submission(self, records: Sequence[Record], answers: Sequence[Ranked], path: Path) -> None:
        """A csv of picture and its most probable labels, a column each."""
        table = io.StringIO()
        rows = ((r.facts.get("id", r.name), *a.labels) for r, a in zip(records, answers, strict=True))
        csv.writer(table, lineterminator="\n").writerows(rows)
        write_text(path, table.getvalue())


def open_task(config: Config) -> Classification:
    """The task."""
    return Classification(config)
