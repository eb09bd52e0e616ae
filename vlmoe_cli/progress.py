"""What a run shows while it trains: a live panel in a terminal, plain lines elsewhere. All of it goes to stderr."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vlmoe_core.train.reporter import Reporter

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlmoe_core.recipe.config import Recipe

POOLS = ("vision", "text", "shared")
FIGURES: Mapping[str, Callable[[list[float]], float]] = {"busiest": max, "dead": sum, "dropped": max, "entropy": min}


def losses_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The losses of a metrics line by part, without the total."""
    return {k.removeprefix("loss/"): v for k, v in record.items() if k.startswith("loss/") and k != "loss/total"}


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of held-out figures, in percent, without those of subsets."""
    found = {k.removeprefix("metric/"): v for k, v in record.items() if k.startswith("metric/")}
    return {name: value for name, value in found.items() if "/" not in name}


def codes_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a visual tokenizer's codes, in words."""
    found = {k.removeprefix("codes/"): v for k, v in record.items() if k.startswith("codes/")}
    shown = {"used": "{:.1%}", "perplexity": "{:.0f}", "pixel_error": "{:.4f}"}
    return {name.replace("_", " "): form.format(found[name]) for name, form in shown.items() if name in found}


def figures_line(record: Mapping[str, Any]) -> str:
    """The losses of a line, its metrics in percent, and the figures of its codes."""
    losses = [f"{name} {value:.3f}" for name, value in losses_of(record).items()]
    metrics = [f"{name} {value:.1f} %" for name, value in metrics_of(record).items()]
    return "  ".join([*losses, *metrics, *(f"codes {name} {value}" for name, value in codes_of(record).items())])


def health_of(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The routers' figures by pool, over its sparse layers: the worst share and entropy, all dead experts."""
    health = {}
    for pool in POOLS:
        values = {
            figure: [v for k, v in record.items() if k.startswith(f"router/{pool}/") and k.endswith(f"/{figure}")]
            for figure in FIGURES
        }
        if values["busiest"]:
            health[pool] = {figure: worst(values[figure]) for figure, worst in FIGURES.items()}
    return health


def health_line(figures: Mapping[str, float]) -> str:
    """One pool's health in words."""
    return (
        f"busiest {figures['busiest']:.0%}, dead {figures['dead']:.0f}, "
        f"dropped {figures['dropped']:.1%}, entropy {figures['entropy']:.2f}"
    )


class SilentProgress(Reporter):
    """Nothing: what every process of a run but the first one shows."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PlainProgress(SilentProgress):
    """A line for each event: for files, pipes and CI."""

    def __init__(self) -> None:
        self.steps = 0
        self.since = (0, 0.0)

    def note(self, message: str) -> None:
        self._line(message)

    def alarm(self, message: str) -> None:
        self._line(f"ALARM {message}")

    def started(self, recipe: "Recipe", folder: Path, step: int, parameters: int) -> None:
        self.steps, self.since = recipe.train.steps, (step, time.monotonic())
        self._line(f"{parameters:,} parameters; {self.steps - step} steps from step {step}; run folder {folder}")

    def stepped(self, record: Mapping[str, Any]) -> None:
        losses = figures_line(record)
        health = "  ".join(f"{pool}: {health_line(figures)}" for pool, figures in health_of(record).items())
        pace = f"{record['samples_per_s']:.0f} samples/s, {self._left(int(record['step']))} left"
        self._line(f"step {record['step']}/{self.steps}  {losses}  {pace}  {health}")

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._line(f"held-out at step {record['step']}: {figures_line(record)}")

    def saved(self, path: Path) -> None:
        self._line(f"saved {path}")

    def _left(self, step: int) -> str:
        """Time to the last step at the mean pace so far, evaluations included."""
        first, started = self.since
        seconds = round((time.monotonic() - started) / max(1, step - first) * (self.steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class ScoringProgress(Reporter):
    """How long a split will take, said once the first batch is done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.batches, self.start = say, 0, 0.0

    def note(self, message: str) -> None:
        self.say(message)

    def counted(self, batches: int) -> None:
        self.batches, self.start = batches, time.monotonic()

    def advanced(self, step: int) -> None:
        if step == 1:
            seconds = (time.monotonic() - self.start) * self.batches
            self.say(f"expected time: about {max(1, round(seconds))} s for {self.batches} batches")


class LiveProgress(Reporter):
    """A progress bar with losses and router health, kept at the bottom of the terminal; events scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed, left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("train", total=None, rate="")
        self.held_out: Mapping[str, Any] = {}
        self.baseline: Mapping[str, float] = {}
        self.live = Live(self.progress, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def note(self, message: str) -> None:
        self._say(message, "dim")

    def alarm(self, message: str) -> None:
        self._say(f"alarm: {message}", "bold red")

    def started(self, recipe: "Recipe", folder: Path, step: int, parameters: int) -> None:
        self._say(f"{parameters:,} parameters; run folder {folder}", "dim")
        self.progress.update(self.task, total=recipe.train.steps, completed=step)

    def advanced(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def stepped(self, record: Mapping[str, Any]) -> None:
        from rich.console import Group

        self.progress.update(self.task, rate=f"{record['samples_per_s']:.0f} samples/s")
        self.live.update(Group(self._losses(record), self._health(record), self.progress))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.held_out = losses_of(record)
        found = {k.removeprefix("baseline/"): v for k, v in record.items() if k.startswith("baseline/")}
        self.baseline = found or self.baseline
        if metrics_of(record) or codes_of(record):
            self._say(f"held-out at step {record['step']}: {figures_line(record)}", "")

    def saved(self, path: Path) -> None:
        self._say(f"saved {path}", "dim")

    def _say(self, message: str, style: str) -> None:
        self.console.print(message, style=style, markup=False, highlight=False)

    def _losses(self, record: Mapping[str, Any]) -> "RenderableType":
        from rich import box
        from rich.table import Table

        columns = {"held out": self.held_out} | ({"unigram": self.baseline} if self.baseline else {})
        table = Table("loss", "training", *columns, box=box.SIMPLE_HEAD)
        for name, value in losses_of(record).items():
            others = [f"{found[name]:.3f}" if name in found else "-" for found in columns.values()]
            table.add_row(name, f"{value:.3f}", *others)
        return table

    def _health(self, record: Mapping[str, Any]) -> "RenderableType":
        from rich import box
        from rich.table import Table

        health = health_of(record)
        table = Table("experts", "busiest", "dead", "dropped", "entropy", box=box.SIMPLE_HEAD, show_header=bool(health))
        for pool, figures in health.items():
            style = "bold red" if figures["dead"] else ""
            cells = (
                f"{figures['busiest']:.0%}",
                f"{figures['dead']:.0f}",
                f"{figures['dropped']:.1%}",
                f"{figures['entropy']:.2f}",
            )
            table.add_row(pool, *cells, style=style)
        return table


def progress() -> SilentProgress | LiveProgress:
    """The display that suits this process and where its stderr goes."""
    if os.environ.get("RANK", "0") != "0":
        return SilentProgress()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()
