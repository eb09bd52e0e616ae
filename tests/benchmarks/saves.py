"""What a checkpoint of two processes costs: against plain files of the same tensors, and the loop that goes on."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tests.benchmarks.common import Times, timings
from tests.benchmarks.sides import PROCESSES, Side, together
from vlmoe_core.checkpoint.files import sha256
from vlmoe_core.checkpoint.restore import named_optimizer_state
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import Companions
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.moe.experts import expert_shares
from vlmoe_core.train.parallel import from_main
from vlmoe_core.train.saving import Keeping, Saving

BETWEEN = 100
"""Steps from one save to the next."""


@dataclass(frozen=True)
class Stall:
    """What an asynchronous save cost the loop, in seconds."""

    step: float
    """A step while nothing is saved, the median."""
    begin: float
    """The call that begins a save."""
    lost: float
    """That call and all by which the steps until the checkpoint is whole took longer than `step` each."""

    def share(self, seconds: float) -> float:
        """Of the time between two saves."""
        return seconds / (BETWEEN * self.step)


class Saver:
    """Saves the objective of a side as a run does."""

    def __init__(self, side: Side, folder: Path) -> None:
        self.side = side
        self.saving = Saving(Keeping(folder, keep_last=1), dist.get_rank(), PROCESSES)
        self._steps = count(1)

    def begin(self) -> None:
        """Begin a checkpoint."""
        self.saving.begin(
            Companions(RunState(next(self._steps), {}), "", lambda folder: None),
            self.side.objective.state_dict(),
            moments(self.side),
            expert_shares(self.side.objective),
        )

    def save(self) -> None:
        """Save, and wait until it is whole."""
        self.begin()
        self.saving.finish()

    def step(self, micro: MicroBatch) -> bool:
        """Take a step; whether a checkpoint that was begun is whole after it."""
        result = self.side.stepper(0, [micro], None, self.saving.tell)
        self.saving.hear(result.told)
        return result.told["whole"] > 0


def moments(side: Side) -> dict[str, Tensor]:
    """The optimiser's state by name."""
    return named_optimizer_state(side.stepper.optimizer, side.objective.named_parameters())


def time_saves(side: Side, whole: Side, repeats: int) -> Times:
    """Seconds of a save by both processes, and of plain files: written by one of them, and by each a half; these are
    hashed as ours are.

    `side` shares the experts out, `whole` holds the same tensors on each process. Both have taken a step.
    """
    tensors = {**whole.objective.state_dict(), **{f"optimizer.{n}": t for n, t in moments(whole).items()}}
    with _shared_folder() as folder:
        saver = Saver(side, folder / "run")
        cases = {
            "save": saver.save,
            "plain": partial(_plain, folder, {} if dist.get_rank() else tensors, _sha256sum),
            "halves": partial(_plain, folder, _half(tensors), sha256),
        }
        return timings({name: together(case) for name, case in cases.items()}, repeats)


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """About half of the bytes for each process: every second tensor of those in the order of size."""
    by_size = sorted(tensors, key=lambda name: (tensors[name].nbytes, name))
    return {name: tensors[name] for name in by_size[dist.get_rank() :: PROCESSES]}


def _plain(folder: Path, tensors: Mapping[str, Tensor], digest: Callable[[Path], object]) -> None:
    """`save_file`, fsync and a SHA-256."""
    if not tensors:
        return
    path = folder / f"plain-{dist.get_rank()}.safetensors"
    save_file(dict(tensors), path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    digest(path)


def _sha256sum(path: Path) -> None:
    subprocess.run(["sha256sum", path], stdout=subprocess.DEVNULL, check=True)


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """A folder for all processes, which goes when all are done with it."""
    folder = Path(from_main(tempfile.mkdtemp() if dist.get_rank() == 0 else None))
    try:
        yield folder
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder)


def time_stall(side: Side, micro: MicroBatch, repeats: int) -> list[Stall]:
    """What a save costs the steps that go on, in each repeat; the first, which takes its memory, is left out."""
    with _shared_folder() as folder:
        saver = Saver(side, folder / "run")
        found = [_stall(saver, micro) for _ in range(repeats + 1)]
        saver.saving.finish()
    return found[1:]


def _stall(saver: Saver, micro: MicroBatch) -> Stall:
    step = median(_seconds_of_step(saver, micro)[0] for _ in range(3))
    start = perf_counter()
    saver.begin()
    begin = perf_counter() - start
    taken, whole = [], False
    while not whole:
        seconds, whole = _seconds_of_step(saver, micro)
        taken.append(seconds)
    return Stall(step, begin, begin + sum(taken) - step * len(taken))


def _seconds_of_step(saver: Saver, micro: MicroBatch) -> tuple[float, bool]:
    start = perf_counter()
    whole = saver.step(micro)
    return perf_counter() - start, whole
