"""Held-out loss: always the same examples with the same masks, evaluation capacity, no noise."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe_core.data.example import Record
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.data.order import derive_key
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.task import Task
from vlmoe_core.train.health import RouterHealth
from vlmoe_core.train.parallel import all_sum, gather_on_main, wide_dtype
from vlmoe_core.train.statistics import Statistics

HELD_OUT_DRAWS = 1
"""Seed of what is drawn in evaluation."""


def draw_as_held_out(number: int) -> None:
    """Seed what is drawn in the evaluation of a micro-batch: the same each time."""
    torch.manual_seed(derive_key(HELD_OUT_DRAWS, number) >> 1)


class Answers:
    """What a model answers to the examples of a task, and what is true of them."""

    def __init__(self, task: Task, labels: Labels) -> None:
        self.task, self.labels = task, labels
        self.found: list[tuple[Record, Any]] = []

    def add(self, records: Sequence[Record], outputs_XF: Tensor) -> None:
        """The outputs for the examples of one micro-batch."""
        self.found += zip(records, self.task.read(outputs_XF, self.labels), strict=True)

    def gather(self) -> tuple[list[Record], list[Any]]:
        """Records and answers of all ranks, in the order of their positions, on rank 0; none on the other ranks.

        Every rank calls it.
        """
        found = [one for part in gather_on_main(self.found) for one in part]
        found.sort(key=lambda one: one[0].position)
        return [record for record, _ in found], [answer for _, answer in found]


@torch.no_grad()
def evaluate(
    objective: nn.Module,
    micros: Iterable[MicroBatch],
    device: torch.device,
    health: RouterHealth,
    answers: Answers | None = None,
) -> dict[str, float]:
    """Mean of every part over the held-out examples of all ranks, their weighted sum, the routers' health, and what the
    objective's statistics say.

    Args:
        objective: the objective, not wrapped.
        micros: this rank's micro-batches, as many on every rank: the last may be empty. At least one.
        device: where to compute.
        health: collects the plans.
        answers: collects what a task's head says.

    Routers that draw (random, `priority: random`) draw the same for a micro-batch each time.
    """
    objective.eval()
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    statistics = Statistics(objective)
    for micro in micros:
        draw_as_held_out(micro.number)
        loss = objective({s: b.to(device) for s, b in micro.batches.items()})
        for name, part in loss.parts.items():
            total = part.sum.to(wide_dtype(device))
            term = torch.stack([total, torch.full_like(total, part.count)])
            sums[name], weights[name] = sums.get(name, 0) + term, part.weight
        health.add(loss.routed)
        statistics.add(loss.statistics)
        if answers is not None and loss.outputs is not None:
            answers.add(micro.records, loss.outputs)
    totals = all_sum(torch.stack(list(sums.values()))).tolist()
    means = {f"loss/{name}": s / n for name, (s, n) in zip(sums, totals, strict=True) if n}
    total = sum(weights[name.removeprefix("loss/")] * mean for name, mean in means.items())
    return {"loss/total": total, **means, **health.summary().figures, **statistics.figures()}


@torch.no_grad()
def unigram_baseline(
    objective: nn.Module, train: Iterable[MicroBatch], held_out: Iterable[MicroBatch], device: torch.device
) -> dict[str, float]:
    """Held-out cross-entropy of the best predictor that sees no context: the frequencies of the training targets.

    Add-one smoothing over all words or codes that occur.

    Returns:
        `baseline/<part>` in nats.
    """
    seen, asked = _histograms(objective, train, device), _histograms(objective, held_out, device)
    return {f"baseline/{name}": _cross_entropy(seen[name], asked[name]) for name in asked if asked[name].sum() > 0}


def _histograms(objective: nn.Module, micros: Iterable[MicroBatch], device: torch.device) -> dict[str, Tensor]:
    """How often each word or code is a target, over all ranks."""
    sizes: Mapping[str, int] = objective.target_sizes  # type: ignore[assignment]
    counts = {name: torch.zeros(size, dtype=wide_dtype(device), device=device) for name, size in sizes.items()}
    for micro in micros:
        for name, ids in objective.targets({s: b.to(device) for s, b in micro.batches.items()}).items():  # type: ignore[operator]
            counts[name] += torch.bincount(ids, minlength=sizes[name])
    return {name: all_sum(count) for name, count in counts.items()}


def _cross_entropy(seen: Tensor, asked: Tensor) -> float:
    occurs = (seen + asked) > 0
    probabilities = (seen + 1) / (seen[occurs] + 1).sum()
    return float(-(asked[occurs] * probabilities[occurs].log()).sum() / asked.sum())
