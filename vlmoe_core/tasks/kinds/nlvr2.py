"""Is a statement true of two pictures (NLVR2), or of three boxes of one (NLVR)?"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
from vlmoe_core.tasks.heads import Pool, pictures_head
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.metrics.pairs import consistent, statement_of
from vlmoe_core.tasks.objective import Choosing, cross_entropy
from vlmoe_core.tasks.task import (
    Ranked,
    Scores,
    Task,
    Values,
    by_fact,
    label_hits,
    label_target,
    picture_groups,
    rank,
    required,
    write_text,
)

LABELS = Labels(("False", "True"))


class Config(TaskConfig):
    """Statements about several pictures."""

    name: Literal["nlvr2"] = "nlvr2"
    """Natural language for visual reasoning."""
    pool: Pool = "both"
    """Which final states of each encoding the head reads (BEiT-3: [CLS] of image and text; VLMo: one of them)."""
    num_images: int = Field(2, ge=1)
    """Pictures of an example; each is encoded together with the statement (NLVR2: 2; the boxes of NLVR: 3)."""


class NLVR2(Task):
    """One encoding a picture, side by side into the head; accuracy and consistency."""

    stream = "pair"
    inputs = ("pair",)
    best = "accuracy"
    tested = "accuracy"
    known_labels = LABELS
    blind = "statement-only"

    def __init__(self, config: Config) -> None:
        self.config = config

    def find_labels(self, train: Iterable[Example], held_out: Iterable[Example]) -> Labels:
        """False and True."""
        return LABELS

    def check_pictures(self, example: Example) -> None:
        """As many as the recipe says."""
        pictures = 1 + len(example.more_images)
        if pictures != self.config.num_images:
            raise DataError(f"has {pictures} pictures, the head takes {self.config.num_images}; set task.num_images")

    def target(self, example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
        """() int64, 1 for true."""
        return label_target(example, labels, training)

    def stand_in(self, noise: Example, labels: Labels, rng: random.Random) -> Example:
        """The picture stands for all of them."""
        assert noise.image is not None
        pictures = (noise.image,) * (self.config.num_images - 1)
        return replace(super().stand_in(noise, labels, rng), more_images=pictures)

    def build(self, encoder: Encoder, labels: Labels) -> nn.Module:
        """LayerNorm and a two-layer head on the encodings (BEiT-3)."""
        config = self.config
        head = pictures_head(config.pool, encoder.config.dim, config.num_images, len(labels.names))
        return Choosing("nlvr2", "pair", encoder, config.pool, head, cross_entropy, config.num_images)

    def read(self, outputs_XF: Tensor, labels: Labels) -> list[Ranked]:
        """False and True with their probabilities."""
        return rank(outputs_XF, labels)

    def score(self, records: Sequence[Record], answers: Sequence[Ranked]) -> Scores:
        """Accuracy, and consistency: the share of sentences that are right for all of their pairs (lil-lab/nlvr).

        No consistency where an identifier does not name the statement, as in VLMo's tables. And the accuracy of each
        type of statement where the data tell it.
        """
        right = label_hits(records, answers)
        statements = [s for r in records if (s := statement_of(str(r.facts.get("id", "")))) is not None]
        if len(statements) < len(records):
            found = {"accuracy": Values(right, picture_groups(records))}
        else:
            accuracy = Values(right, np.unique(statements, return_inverse=True)[1])
            found = {"accuracy": accuracy, "consistency": Values(consistent(statements, right.tolist()))}
        return Scores(found | by_fact("statement", found["accuracy"], records, "statement_type"))

    def write_submission(self, records: Sequence[Record], answers: Sequence[Ranked], path: Path) -> None:
        """A csv of identifier and prediction."""
        lines = [f"{required(r, 'id')},{a.labels[0]}\n" for r, a in zip(records, answers, strict=True)]
        write_text(path, "".join(lines))


def open_task(config: Config) -> NLVR2:
    """The task."""
    return NLVR2(config)
