"""Tiny objectives of every task, random labelled batches, and hand-made records and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.model.support import SPARSE, VOCAB, collate_of, config_of, randomise, samples_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Example, Record, Sample
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.objectives.loss import Loss
from vlmoe_core.tasks.kinds import classification, nli, nlvr2, retrieval, vqa
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.task import Ranked, Task

LENGTHS = [5, 2, 9, 4]
LABELS = Labels(("ant", "bee", "cat", "dog", "elk", "fox"))

QUIET: dict[str, Any] = {
    pool: {**moe, "noise": 0, "capacity_factor": None, "balance": {"vloss": 0}} for pool, moe in SPARSE.items()
}
"""Sparse layers without noise, dropped tokens and balance losses: examples don't see each other."""

TASKS: dict[str, Task] = {
    "vqa": vqa.open_task(vqa.Config()),
    "vqa means": vqa.open_task(vqa.Config(pool="means")),
    "nlvr2": nlvr2.open_task(nlvr2.Config()),
    "nlvr": nlvr2.open_task(nlvr2.Config(num_images=3, pool="text")),
    "classification": classification.open_task(classification.Config()),
    "classification mixed": classification.open_task(classification.Config(mixup=0.8, cutmix=1, label_smoothing=0.1)),
    "nli": nli.open_task(nli.Config()),
    "nli sentences": nli.open_task(nli.Config(pool="sentences")),
    "retrieval": retrieval.open_task(retrieval.Config()),
    "retrieval both": retrieval.open_task(retrieval.Config(pool="both")),
    "retrieval contrast": retrieval.open_task(retrieval.Config(itm_weight=0)),
}
IMAGES = {"nlvr2": 2, "nlvr": 3}
CHOOSING = [name for name in TASKS if not name.startswith("retrieval")]


def objective_of(name: str, dtype: torch.dtype = torch.float64, **values: Any) -> Any:
    """The objective of a task, every parameter random."""
    torch.manual_seed(0)
    objective = TASKS[name].build(Encoder(config_of(**values), VOCAB), labels_of(name))
    randomise(objective)
    return objective.to(dtype)


def labels_of(name: str) -> Labels:
    """Those of the task; any six where the data tell them."""
    own = TASKS[name].find_labels([], []) if name.startswith(("nl", "retrieval")) else LABELS
    return own


def task_samples(name: str, config: ModelConfig, lengths: Sequence[int] = LENGTHS) -> list[Sample]:
    """Random examples of a task with random targets, with nothing hidden."""
    rng = np.random.default_rng(7)
    stream = TASKS[name].stream
    second_at = 2 if name == "nli sentences" else None
    return [
        replace(
            shown(sample),
            target=target_of(name, rng),
            more_pixels=pictures(IMAGES.get(name, 1) - 1, config, rng),
            second_text_at=second_at,
        )
        for sample in samples_of(stream, lengths, config)
    ]


def shown(sample: Sample) -> Sample:
    """The sample with nothing hidden."""
    mask = None if sample.patch_mask is None else np.zeros_like(sample.patch_mask)
    targets = None if sample.text_targets is None else np.full_like(sample.text_targets, -1)
    return replace(sample, patch_mask=mask, text_targets=targets)


def pictures(number: int, config: ModelConfig, rng: np.random.Generator) -> tuple[NDArray[np.uint8], ...]:
    """Random pictures."""
    side = config.image_size
    return tuple(rng.integers(0, 256, (3, side, side), dtype=np.uint8) for _ in range(number))


def target_of(name: str, rng: np.random.Generator) -> NDArray[np.generic] | None:
    """A random target."""
    if name.startswith("retrieval"):
        return None
    count = len(labels_of(name).names)
    if name.startswith("vqa"):
        return rng.choice([0, 0.3, 1], count).astype(np.float32)
    return np.array(rng.integers(count))


def batches_of(name: str, samples: Sequence[Sample], config: ModelConfig) -> dict[StreamName, Batch]:
    """The micro-batch of a task."""
    stream = TASKS[name].stream
    return {stream: collate_of(stream, samples, config)}


def task_batches(name: str, config: ModelConfig, lengths: Sequence[int] = LENGTHS) -> dict[StreamName, Batch]:
    """The micro-batch of `task_samples`."""
    return batches_of(name, task_samples(name, config, lengths), config)


def backward(objective: Any, batches: Mapping[StreamName, Batch]) -> tuple[Loss, dict[str, Tensor]]:
    """Loss of a micro-batch that is the whole step, and the gradients that there are."""
    objective.zero_grad()
    loss: Loss = objective(batches)
    loss.total(objective.counts(batches)).backward()
    return loss, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def record(number: int, image_id: int = -1, **facts: Any) -> Record:
    """A record with those facts."""
    return Record(number, f"test.jsonl:{number + 1}", image_id, "", "", facts)


def example(**facts: Any) -> Example:
    """An example with those facts."""
    return Example("train.jsonl:1", facts=facts)


def ranked(*labels: str) -> Ranked:
    """An answer."""
    return Ranked(labels, tuple(1 / (n + 2) for n in range(len(labels))))
