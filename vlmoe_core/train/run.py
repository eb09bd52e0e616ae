"""A training run, from its recipe to its last checkpoint."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from vlmoe_core.checkpoint.metrics import metrics_offset
from vlmoe_core.checkpoint.restore import named_optimizer_state
from vlmoe_core.checkpoint.write import Companions
from vlmoe_core.data.config import STREAMS
from vlmoe_core.data.example import Record
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.errors import DataError, TrainError
from vlmoe_core.moe.experts import expert_shares
from vlmoe_core.objectives.learning import Learns
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import LoadedRecipe, dump_recipe
from vlmoe_core.tasks.task import Task, open_task
from vlmoe_core.train.evaluate import Answers, evaluate, unigram_baseline
from vlmoe_core.train.health import Alarm, HealthSummary, RouterHealth
from vlmoe_core.train.interrupt import Interrupt
from vlmoe_core.train.lost import lost_processes_told
from vlmoe_core.train.metrics import MetricsLog
from vlmoe_core.train.parallel import (
    broadcast_buffers,
    end_processes,
    from_main,
    of_all,
    on_main,
    refuse_broken,
    refuse_codes,
)
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.saving import Keeping, Saving
from vlmoe_core.train.session import RunOptions, Session, open_session
from vlmoe_core.train.step import Stepper, StepResult
from vlmoe_core.train.wrapping import num_parameters

NOTHING_HELD_OUT = "data.eval has no readable example; mend its files, or take other ones"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    """The run folder."""
    step: int
    """Optimiser steps that are done."""
    finished: bool
    """All steps are done; False: a signal ended the run early."""
    signal: int | None
    """The signal that this rank received."""
    seconds: float
    """Duration of this part of the run."""
    broken: int
    """Training examples that were skipped as broken in this part of the run."""
    is_main: bool
    """This is rank 0."""


Figures = Callable[[], Mapping[str, float]]
"""Tells what belongs to a line of metrics; every rank asks."""


class Watch(Protocol):
    """Looks on while the objective is evaluated."""

    def __call__(self, objective: nn.Module, recipe: Recipe) -> AbstractContextManager[Figures]:
        """Around one evaluation."""
        ...


class Saves(Protocol):
    """Is told of every checkpoint, on rank 0 alone."""

    def on_saved(self, path: Path) -> None:
        """A checkpoint folder is whole on disk."""
        ...

    def held(self) -> Collection[Path]:
        """Checkpoints that must not be removed yet."""
        ...


class NoSaves:
    """Nobody is told."""

    def on_saved(self, path: Path) -> None:
        """Does nothing."""

    def held(self) -> Collection[Path]:
        """None."""
        return ()


@contextmanager
def watch_nothing(objective: nn.Module, recipe: Recipe) -> Iterator[Figures]:
    """No figures."""
    yield dict


def run_training(
    loaded: LoadedRecipe,
    options: RunOptions,
    reporter: Reporter,
    watch: Watch = watch_nothing,
    saves: Saves = NoSaves(),
) -> Outcome:
    """Run a recipe to its end, or until SIGINT or SIGTERM, which end it after the step with a checkpoint.

    Args:
        loaded: the recipe.
        options: folder, resume, overwrite.
        reporter: is told of all that happens; only rank 0's is.
        watch: looks on while held-out examples are evaluated, and adds to their line of metrics.
        saves: is told of every checkpoint.

    Raises:
        VlmoeError: see `open_session`; TrainError when a loss is not finite, or another process is gone.
    """
    with lost_processes_told():
        outcome = _train(loaded, options, reporter, watch, saves)
        end_processes()
    return outcome


def _train(loaded: LoadedRecipe, options: RunOptions, reporter: Reporter, watch: Watch, saves: Saves) -> Outcome:
    start = time.monotonic()
    session = open_session(loaded, options, reporter)
    try:
        with Interrupt() as interrupt:
            broken = Trainer(session, reporter, watch, saves).fit(interrupt)
    finally:
        for tracker in session.accelerator.trackers:
            tracker.finish()
    state, steps = session.state, loaded.recipe.train.steps
    seconds = time.monotonic() - start
    is_main = session.accelerator.is_main_process
    return Outcome(session.folder.path, state.step, state.step == steps, interrupt.received, seconds, broken, is_main)


def open_stepper(session: Session) -> Stepper:
    """What takes the steps of a run."""
    recipe = session.recipe
    return Stepper(
        session.accelerator,
        session.model,
        session.mesh,
        session.optimizer,
        recipe.optim,
        recipe.train.steps,
        recipe.seed,
        recipe.data.on_error,
    )


class Trainer:
    """The loop: steps, metrics, held-out evaluations, checkpoints."""

    def __init__(
        self, session: Session, reporter: Reporter, watch: Watch = watch_nothing, saves: Saves = NoSaves()
    ) -> None:
        self.session, self.recipe, self.watch, self.saves = session, session.recipe, watch, saves
        self.reporter = reporter if session.accelerator.is_main_process else Reporter()
        self.metrics = MetricsLog(session.folder.metrics, session.accelerator)
        self.stepper = open_stepper(session)
        accelerator = session.accelerator
        keeping = Keeping(session.folder.path, self.recipe.train.keep_last, saves.held, self._saved)
        self.saving = Saving(keeping, accelerator.process_index, accelerator.num_processes)
        self.alarm = Alarm()
        self.task = open_task(self.recipe.task) if self.recipe.task else None

    def fit(self, interrupt: Interrupt) -> int:
        """Train from the session's step to the last. Returns the number of broken examples that it met."""
        session = self.session
        run = session.state.tracker_run
        session.accelerator.init_trackers(
            "vlmoe",
            config={"recipe": session.name},
            init_kwargs={"wandb": {"id": run, "resume": "allow"}, "trackio": {"name": run, "resume": "allow"}},
        )
        parameters = num_parameters(session.objective)
        self.reporter.started(self.recipe, session.folder.path, session.state.step, parameters)
        if session.state.step == 0:
            self._start_if_due()
            self._evaluate(with_baseline=True)
        with self.saving:
            return self._steps(interrupt)

    def _steps(self, interrupt: Interrupt) -> int:
        """As `fit`, but for what comes before the first step."""
        session, train = self.session, self.recipe.train
        micros, broken = session.train_micros(), 0
        pace = Pace(sum(self.recipe.batch.size.of(stream) for stream in STREAMS))
        per_step = self.recipe.batch.num_micro // session.accelerator.num_processes
        for step in range(session.state.step, train.steps):
            logs = (step + 1) % train.log_every == 0 or step == 0
            health = RouterHealth() if logs else None
            with pace.step():
                drawn = list(islice(micros, per_step))
                result = self.stepper(step, drawn, health, lambda: self._tell(interrupt))
            self.saving.hear(result.told)
            broken += result.broken
            session.state = replace(session.state, step=step + 1, positions=self._positions(step + 1))
            if health is not None:
                self._log(result, health.summary(), pace.rate())
                if step == 0:
                    self._tell_capacity(health, "training")
            self._start_if_due()
            self.reporter.advanced(step + 1)
            improved = self._is_due(train.eval_every) and self._evaluate()
            if improved or result.told["stop"] or self._is_due(train.save_every):
                self._save()
            if result.told["stop"]:
                break
        return broken

    def _tell(self, interrupt: Interrupt) -> dict[str, float]:
        """What this rank tells the others at each step."""
        return {"stop": float(interrupt.received is not None), **self.saving.tell()}

    def _start_if_due(self) -> None:
        """Let an objective that learns beside gradients see the first micro-batches; all ranks begin as rank 0 does."""
        objective = self.session.objective
        if not isinstance(objective, Learns) or objective.starts_at != self.session.state.step:
            return
        device, data = self.session.accelerator.device, self.session.train_data
        once = max(-(-stream.epoch // data.sizes[name]) for name, stream in data.streams.items())
        micros = (data[number] for number in range(once))
        objective.eval()
        objective.start({s: b.to(device) for s, b in micro.batches.items()} for micro in micros)
        broadcast_buffers(objective)
        self.session.state = replace(self.session.state, best_score=None, best_step=None)  # it had no codes

    def _is_due(self, every: int) -> bool:
        return self.session.state.step % every == 0 or self.session.state.step == self.recipe.train.steps

    def _positions(self, step: int) -> dict[str, int]:
        return {stream: step * self.recipe.batch.size.of(stream) for stream in STREAMS}

    def _log(self, result: StepResult, health: HealthSummary, rate: float) -> None:
        losses = {_metric_name(name): value for name, value in result.losses.items()}
        norm = {} if result.grad_norm is None else {"grad_norm": result.grad_norm}
        self._write("train", {"samples_per_s": rate, "lr": result.lr, **norm, **losses, **health.figures})
        for message in self.alarm.messages(health.idle):
            self.reporter.alarm(f"{message}, the second time at step {self.session.state.step}")

    def _tell_capacity(self, health: RouterHealth, mode: str) -> None:
        """The effective capacities at the beginning: they are rounded up, and follow the number of tokens."""
        for layer, group in health.groups.items():
            self.reporter.note(f"{layer} in {mode}: {group}")

    def _evaluate(self, with_baseline: bool = False) -> bool:
        """Write a line of held-out metrics. Returns whether the loss is the best so far.

        Raises:
            DataError: a held-out example is broken and `data.on_error` is `raise`; all are broken; the truth is hidden.
            TokenizerError: stored codes are of other pixels.
            TrainError: a held-out loss is not finite.
        """
        session = self.session
        if not session.eval_data.streams:
            return False
        device = session.accelerator.device
        broken: list[str] = []
        refused: list[str] = []
        health = RouterHealth()
        answers = Answers(self.task, session.tokenizers.labels) if self.task else None
        micros = _noting(session.eval_micros(), broken, refused)
        with self.watch(session.objective, self.recipe) as figures:
            record = evaluate(session.objective, micros, device, health, answers) | dict(figures())
        if with_baseline:
            self._tell_capacity(health, "evaluation")
        if with_baseline and self.recipe.hides:
            train = _noting(session.baseline_micros(), broken, refused)
            record |= unigram_baseline(session.objective, train, session.eval_micros(), device)
        refuse_codes(refused)
        if self.recipe.data.on_error == "raise":
            refuse_broken(broken)
        _check_finite(record, session.state.step)
        if answers is None:
            _check_some(record)
        score = record["loss/total"]
        if answers is not None:
            metrics = from_main(on_main(partial(_metrics, answers.task, *answers.gather())))
            record |= {f"metric/{name}": value for name, value in metrics.items()}
            score = -metrics[answers.task.best]
        self._write("eval", record)
        best = session.state.best_score
        if best is not None and score >= best:
            return False
        session.state = replace(session.state, best_score=score, best_step=session.state.step)
        return session.state.step > 0

    def _write(self, split: str, record: Mapping[str, float]) -> None:
        line: dict[str, float | str] = {"step": self.session.state.step, "split": split, "time": time.time(), **record}
        told = self.reporter.stepped if split == "train" else self.reporter.evaluated

        def write() -> None:
            self.metrics.write(line)
            told(line)

        on_main(write)

    def _save(self) -> None:
        """Begin a checkpoint; it is whole some steps later, or when the run ends."""
        session = self.session
        scaler = session.accelerator.scaler
        state = replace(
            session.state,
            metrics_offset=on_main(lambda: metrics_offset(session.folder.metrics)) or 0,
            scaler=scaler.state_dict() if scaler is not None else None,
        )
        self.saving.begin(
            Companions(state, dump_recipe(self.recipe), session.folder.tokenizers),
            session.objective.state_dict(),
            named_optimizer_state(session.optimizer, session.objective.named_parameters()),
            expert_shares(session.objective),
        )

    def _saved(self, path: Path) -> None:
        self.saves.on_saved(path)
        self.reporter.saved(path)


class Pace:
    """Examples per second over all ranks; evaluations and checkpoints don't count, waiting for data does."""

    def __init__(self, examples_per_step: int) -> None:
        self.examples_per_step, self.steps, self.seconds = examples_per_step, 0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        started = time.monotonic()
        yield
        self.steps, self.seconds = self.steps + 1, self.seconds + time.monotonic() - started

    def rate(self) -> float:
        """Examples per second since the last question."""
        rate = self.steps * self.examples_per_step / max(1e-9, self.seconds)
        self.steps, self.seconds = 0, 0.0
        return rate


def _noting(micros: Iterable[MicroBatch], broken: list[str], refused: list[str]) -> Iterator[MicroBatch]:
    """The same micro-batches; adds what is broken to `broken`, and why stored codes are refused to `refused`."""
    for micro in micros:
        broken.extend(micro.broken)
        refused.extend([micro.refused] if micro.refused is not None else [])
        yield micro


def _check_finite(record: Mapping[str, float], step: int) -> None:
    """Raises TrainError if a held-out loss is not finite."""
    wrong = [name.removeprefix("loss/") for name, value in record.items() if not math.isfinite(value)]
    if wrong:
        where = ", ".join(wrong)
        raise of_all(TrainError(f"step {step}: the held-out loss is not finite in {where}; no checkpoint was written"))


def _check_some(record: Mapping[str, float]) -> None:
    """Raises DataError if the held-out loss is that of no example."""
    if not any(name.startswith("loss/") for name in record.keys() - {"loss/total"}):
        raise of_all(DataError(NOTHING_HELD_OUT))


def _metrics(task: Task, records: Sequence[Record], answers: Sequence[Any]) -> dict[str, float]:
    """A task's metrics in percent. Raises DataError where there is no example, or its truth is hidden."""
    if not records:
        raise DataError(NOTHING_HELD_OUT)
    if not task.can_score(records):
        raise DataError(
            "data.eval does not hold the truth, so finetuning can't be scored on it; give it examples whose truth is "
            "known, and list those without under data.test"
        )
    return task.score(records, answers).percents()


def _metric_name(part: str) -> str:
    return part if part.startswith("balance/") else f"loss/{part}"
