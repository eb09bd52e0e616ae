"""Visual question answering as the choice of an answer from a list (VQA v2; VL-MoE, arXiv 2303.07226).

Axis letter: A answers.
"""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from vlmoe_core.data.class_files import answer_list
from vlmoe_core.data.example import Example, Record
from vlmoe_core.errors import DataError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tasks.config import TaskConfig
from vlmoe_core.tasks.heads import MLPHead, Pool, answer_head
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.metrics.vqa import answer_classes, soft_targets, vqa_accuracy
from vlmoe_core.tasks.objective import Choosing, binary_cross_entropy
from vlmoe_core.tasks.task import Ranked, Scores, Task, Values, by_fact, picture_groups, rank, required, write_text


class Config(TaskConfig):
    """Questions about pictures."""

    name: Literal["vqa"] = "vqa"
    """Visual question answering."""
    pool: Pool = "image"
    """Which final states the head reads (BEiT-3: the image's [CLS])."""
    answers: str | None = None
    """File with the answer list, relative to the working folder (not to `data.root`): a JSON list, a JSON object
    answer -> number, or BEiT-3's answer2label.txt (a name that ends in .txt or .jsonl). Null: built from the data."""
    min_count: int = Field(9, ge=1)
    """Occurrences as the most common answer of a question that make an answer part of the list (VQA v2: 9). Files that
    store soft targets (BEiT-3, VLMo) tell no such answer: all that they score are in the list."""
    held_out_answers: bool = True
    """Count the answers of `data.eval` as well for the list, as VQA v2's usual list does."""


class VQA(Task):
    """Soft targets, binary cross-entropy over the answers, VQA accuracy."""

    stream = "pair"
    inputs = ("pair",)
    best = "accuracy"
    tested = "accuracy"
    blind = "question-only"

    def __init__(self, config: Config) -> None:
        self.config = config

    def find_labels(self, train: Iterable[Example], held_out: Iterable[Example]) -> Labels:
        """The answer list: read; or built by VQA v2's rule, then the answers of stored soft targets as they come.

        Raises DataError for a list that can't be had.
        """
        if self.config.answers is not None:
            return Labels(read_answers(Path(self.config.answers)))
        examples = chain(train, held_out) if self.config.held_out_answers else train
        common: list[str] = []
        scored: dict[str, None] = {}
        for example in examples:
            if "answer" in example.facts:
                common.append(example.facts["answer"])
            else:
                scored.update(dict.fromkeys(example.facts.get("scores", ())))
        known = dict.fromkeys((*answer_classes(common, self.config.min_count), *scored))
        if not known:
            raise DataError(
                f"no answer occurs {self.config.min_count} times as the most common one of a question; lower "
                "task.min_count, or name a list with task.answers"
            )
        return Labels(tuple(known))

    def target(self, example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
        """(A,) float32, the soft score of each answer.

        A question of which no answer is in the list can't be learned from: it is refused in training.
        """
        scores = _scores(example.facts, labels.index)
        if scores is None and training:
            raise DataError("has no answers, which training needs")
        if scores is None:
            return None
        known = {labels.index[a]: s for a, s in scores.items() if a in labels.index}
        if training and not known:
            raise DataError(
                f"none of its answers ({', '.join(map(repr, scores)) or 'none'}) is in the list of {len(labels.names)}"
            )
        target_A = np.zeros(len(labels.names), dtype=np.float32)
        target_A[list(known)] = list(known.values())
        return target_A

    def stand_in(self, noise: Example, labels: Labels, rng: random.Random) -> Example:
        """One answer is right."""
        return replace(noise, facts={"scores": {rng.choice(labels.names): 1.0}})

    def build(self, encoder: Encoder, labels: Labels) -> nn.Module:
        """Pooler and two-layer head over the answers (VLMo, BEiT-3).

        Every answer begins with a probability of one in A. From one half, the first steps do nothing but push all
        logits down, through the pooler too, which is then saturated for good where answers are many and steps few.
        """
        head = answer_head(self.config.pool, encoder.config.dim, len(labels.names))
        objective = Choosing("vqa", "pair", encoder, self.config.pool, head, binary_cross_entropy)
        last = head[-1]
        assert isinstance(last, MLPHead)
        nn.init.constant_(last.out.bias, -math.log(max(1, len(labels.names) - 1)))
        return objective

    def read(self, outputs_XF: Tensor, labels: Labels) -> list[Ranked]:
        """The most probable answers; each answer has a probability of its own."""
        return rank(outputs_XF, labels, torch.sigmoid)

    def score(self, records: Sequence[Record], answers: Sequence[Ranked]) -> Scores:
        """VQA accuracy, of all and by answer type and question type (GT-Vision-Lab/VQA).

        Questions of one picture are drawn together for the intervals.
        """
        values = np.array([_accuracy(r, a.labels[0]) for r, a in zip(records, answers, strict=True)])
        accuracy = Values(values, picture_groups(records))
        by_answer = by_fact("accuracy", accuracy, records, "answer_type")
        return Scores({"accuracy": accuracy} | by_answer | by_fact("question", accuracy, records, "question_type"))

    def write_submission(self, records: Sequence[Record], answers: Sequence[Ranked], path: Path) -> None:
        """The JSON list that the VQA server takes."""
        found = [
            {"question_id": required(r, "id"), "answer": a.labels[0]} for r, a in zip(records, answers, strict=True)
        ]
        write_text(path, json.dumps(found, ensure_ascii=False))

    def truth(self, example: Example | Record) -> str | None:
        """The most common human answer, or the one with the highest score."""
        scores = example.facts.get("scores")
        return max(scores, key=scores.get) if scores else example.facts.get("answer")


def read_answers(path: Path) -> tuple[str, ...]:
    """The answers in a file, in the order of their numbers. Raises DataError if it holds no such list."""
    is_lines = path.suffix in (".txt", ".jsonl")
    found = answer_list(path, f"task.answers: {path}") if is_lines else _in_order(path)
    if len(set(found)) < len(found):
        twice = next(answer for answer in found if found.count(answer) > 1)
        raise DataError(f"task.answers: {path} holds '{twice}' twice")
    return found


def _in_order(path: Path) -> tuple[str, ...]:
    """The answers in a JSON list, or in a JSON object by their numbers."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"task.answers: {path} can't be read as JSON: {error}") from error
    if isinstance(found, dict) and all(type(n) is int for n in found.values()):
        in_order = sorted(found, key=lambda answer: found[answer])
        found = in_order if [found[answer] for answer in in_order] == list(range(len(found))) else None
    if not isinstance(found, list) or not found or not all(isinstance(answer, str) for answer in found):
        raise DataError(f"task.answers: {path} holds no JSON list of answers, and no object answer -> 0, 1, 2, ...")
    return tuple(found)


def _scores(facts: Mapping[str, Any], known: Mapping[str, int]) -> Mapping[str, float] | None:
    """The soft score of every answer as it is written; those outside of the list with 0; null where hidden."""
    if "scores" in facts:
        return facts["scores"]  # type: ignore[no-any-return]
    if "answers" not in facts:
        return None
    return dict.fromkeys(facts["answers"], 0.0) | soft_targets(facts["answers"], known)


def _accuracy(record: Record, answer: str) -> float:
    if "scores" in record.facts:
        return float(record.facts["scores"].get(answer, 0.0))
    return vqa_accuracy(answer, required(record, "answers"))


def open_task(config: Config) -> VQA:
    """The task."""
    return VQA(config)
