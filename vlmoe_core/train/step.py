"""One optimiser step: all micro-batches of a rank, then clip and update."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.data.order import derive_key
from vlmoe_core.errors import TrainError
from vlmoe_core.objectives.loss import Loss, Part
from vlmoe_core.train.bias import RouterBiases
from vlmoe_core.train.config import OptimConfig
from vlmoe_core.train.gradients import Gradients, agree_on_overflow
from vlmoe_core.train.health import RouterHealth
from vlmoe_core.train.mesh import Mesh
from vlmoe_core.train.optim import FACTOR, learning_rate
from vlmoe_core.train.parallel import (
    all_sum,
    gather_messages,
    of_all,
    refresh_expert_copies,
    refuse_broken,
    refuse_codes,
    wide_dtype,
)
from vlmoe_core.train.statistics import Statistics


@dataclass(frozen=True)
class StepResult:
    """What one step measured, over all ranks."""

    losses: Mapping[str, float]
    """Mean of each part, and `total`, the weighted sum that was minimised."""
    grad_norm: float | None
    """Global norm of the gradient before clipping; null: it overflowed in fp16, and the scaler skipped the update."""
    lr: float
    """Learning rate of the step."""
    broken: int
    """Examples of the step that were skipped as broken."""
    told: Mapping[str, float]
    """What the ranks had to tell each other, summed over them."""


class Stepper:
    """Takes optimiser steps; the loss and gradient depend on the micro-batches, not on which rank computes which.

    Args:
        accelerator: processes, precision, scaler.
        model: the wrapped objective.
        mesh: how the processes share it.
        optimizer: the prepared optimiser.
        config: schedule and clipping.
        steps: length of the run.
        seed: the recipe's seed; noise draws from (seed, step, number of the micro-batch).
        on_error: raise: a broken example ends the run; skip: its place stays empty.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        mesh: Mesh,
        optimizer: AcceleratedOptimizer,
        config: OptimConfig,
        steps: int,
        seed: int,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.config, self.steps, self.seed, self.on_error = config, steps, seed, on_error
        self.objective: Any = accelerator.unwrap_model(model)
        self.gradients = Gradients(self.objective, mesh)
        self.biases = RouterBiases(model)
        self.statistics = Statistics(self.objective)

    def __call__(
        self,
        step: int,
        micros: Sequence[MicroBatch],
        health: RouterHealth | None = None,
        tell: Callable[[], Mapping[str, float]] = dict,
    ) -> StepResult:
        """Take the 0-based step `step` on this rank's micro-batches.

        Args:
            step: 0-based.
            micros: this rank's micro-batches of the step, on any device.
            health: collects the plans, if given.
            tell: what this rank has to tell the others, under the same names on all ranks; asked when the losses are
                known.

        Raises:
            DataError: some rank met a broken example and `on_error` is `raise`.
            TokenizerError: some rank met stored codes of other pixels.
            TrainError: a loss or the gradient is not finite. No weight was changed, in any case.
        """
        counts, broken, refused = self._global_counts(micros)
        if refused:
            refuse_codes([micro.refused for micro in micros if micro.refused is not None])
        micros = [self._on_device(micro) for micro in micros]
        self.biases.forget()
        self.statistics.forget()
        if broken and self.on_error == "raise":
            refuse_broken([message for micro in micros for message in micro.broken])
        lr = self._set_learning_rate(step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = [
            self._backward(step, micro, counts, health, last=number == len(micros) - 1)
            for number, micro in enumerate(micros)
        ]
        self.gradients.sum_shares()
        losses, told = self._reduce(step, micros, sums, counts, tell())
        grad_norm = self._update(step)
        return StepResult(losses, grad_norm, lr, broken, told)

    def _on_device(self, micro: MicroBatch) -> MicroBatch:
        device = self.accelerator.device
        return MicroBatch(micro.number, {s: b.to(device) for s, b in micro.batches.items()}, micro.broken)

    def _global_counts(self, micros: Sequence[MicroBatch]) -> tuple[dict[str, float], int, int]:
        """Counts of every part, of broken examples and of refused micro-batches, over all micro-batches and ranks."""
        local = [self.objective.counts(micro.batches) for micro in micros]
        names = list(local[0])
        totals = [float(sum(counts[name] for counts in local)) for name in names]
        faults = [float(sum(len(m.broken) for m in micros)), float(sum(m.refused is not None for m in micros))]
        *values, broken, refused = self._sum([*totals, *faults])
        return dict(zip(names, values, strict=True)), int(broken), int(refused)

    def _sum(self, numbers: Sequence[float | Tensor]) -> list[float]:
        """Numbers summed over all ranks: those on the device first, then those of the host, each in their order."""
        device = self.accelerator.device
        known = [n.to(wide_dtype(device)) for n in numbers if isinstance(n, Tensor)]
        told = torch.tensor([n for n in numbers if not isinstance(n, Tensor)], dtype=wide_dtype(device), device=device)
        total: list[float] = all_sum(torch.cat([torch.stack(known), told]) if known else told).tolist()
        return total

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group[FACTOR]
        return lr

    def _backward(
        self, step: int, micro: MicroBatch, counts: Mapping[str, float], health: RouterHealth | None, last: bool
    ) -> Loss:
        """Forward and backward of one micro-batch; ranks exchange gradients at the last."""
        torch.manual_seed(derive_key(self.seed, step, micro.number) >> 1)
        waits = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with waits:
            loss: Loss = self.model(micro.batches)
            # DistributedDataParallel and fully_shard take the mean over ranks; the counts already are global.
            self.accelerator.backward(loss.total(counts) * self.accelerator.num_processes)
        self.biases.add(one for _, one in loss.routed)
        self.statistics.add(loss.statistics)
        if health is not None:
            health.add(loss.routed)
        return loss.detached()

    def _reduce(
        self,
        step: int,
        micros: Sequence[MicroBatch],
        losses: Sequence[Loss],
        counts: Mapping[str, float],
        tells: Mapping[str, float],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Means over all ranks, and the sums of what they tell.

        Raises TrainError, on every rank, if one of the means is not finite.
        """
        parts = losses[0].parts
        sums = {name: torch.stack([loss.parts[name].sum for loss in losses]).sum() for name in parts}
        totals = self._sum([*sums.values(), *map(float, tells.values())])
        values, told = totals[: len(sums)], totals[len(sums) :]
        means = {name: v / counts[name] for name, v in zip(sums, values, strict=True) if counts[name]}
        means["total"] = sum(parts[name].weight * mean for name, mean in means.items())
        if not math.isfinite(means["total"]):
            found = gather_messages(_culprits(micros, losses)) or ["the sum of all parts"]
            where = "; ".join(found)
            raise of_all(TrainError(f"step {step + 1}: the loss is not finite in {where}; nothing was updated"))
        return means, dict(zip(tells, told, strict=True))

    def _update(self, step: int) -> float | None:
        """Clip and update; the norm before clipping, or null where the scaler met an overflow and skips the update."""
        self.accelerator.unscale_gradients()
        grad_norm = float(self.gradients.clip(self.config.clip_norm or math.inf))
        finite = math.isfinite(grad_norm)
        if not finite and self.accelerator.scaler is None:
            raise of_all(
                TrainError(f"step {step + 1}: the gradient is not finite although the loss is; nothing was updated")
            )
        if self.accelerator.scaler is not None and self.gradients.spread:
            agree_on_overflow(self.accelerator.scaler, self.optimizer)
        self.optimizer.step()
        refresh_expert_copies(self.model)
        if finite:
            self.biases.update()
            self.statistics.update(step)
        return grad_norm if finite else None


def _culprits(micros: Sequence[MicroBatch], losses: Sequence[Loss]) -> str | None:
    """The parts that are not finite on this rank, with the stream and positions of their examples."""
    found = [
        f"{name} ({_places(micro, part)})"
        for micro, loss in zip(micros, losses, strict=True)
        for name, part in loss.parts.items()
        if not bool(torch.isfinite(part.sum))
    ]
    return "; ".join(found) or None


def _places(micro: MicroBatch, part: Part) -> str:
    """Where the examples of a part stand; the images and texts that retrieval encodes alone come from its pairs."""
    streams = [stream for stream in part.streams if stream in micro.batches] or list(micro.batches)
    batches = {stream: micro.batches[stream] for stream in streams}
    return "; ".join(f"{s} stream, positions {_span(b.positions)}" for s, b in batches.items() if b.num_sequences)


def _span(positions: Tensor) -> str:
    return f"{int(positions.min())} to {int(positions.max())}"
