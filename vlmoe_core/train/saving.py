"""Saves checkpoints while the run goes on.

A step waits only until the tensors are copied to host memory. Then a thread of each rank writes what that rank owns;
when all have done so, which they tell each other in the sums of a step, a thread of rank 0 makes the checkpoint whole.
No thread talks to another rank.
"""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from vlmoe_core.checkpoint.held import share_of
from vlmoe_core.checkpoint.layout import MODEL, OPTIMIZER, prune, step_folder
from vlmoe_core.checkpoint.manifest import FileRecord
from vlmoe_core.checkpoint.offers import Offers, offer
from vlmoe_core.checkpoint.owners import Plan, make_plan
from vlmoe_core.checkpoint.shards import MAX_SHARD_BYTES, write_files
from vlmoe_core.checkpoint.snapshot import Snapshot
from vlmoe_core.checkpoint.write import UNTOUCHED, Companions, finish_checkpoint, open_checkpoint
from vlmoe_core.errors import CheckpointError, TrainError, VlmoeError
from vlmoe_core.moe.share import Share
from vlmoe_core.train.parallel import from_main, gather_objects, of_all, on_main
from vlmoe_core.train.work import Work


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints of a run stay, and who is told of them."""

    run: Path
    """The run folder."""
    keep_last: int
    """So many newest ones stay, and the best one."""
    held: Callable[[], Collection[Path]] = tuple
    """Tells which ones must stay as well; asked from a thread."""
    saved: Callable[[Path], None] = lambda path: None
    """Is told on rank 0 of each one that is whole."""


@dataclass(frozen=True)
class _Begun:
    """A checkpoint that is not yet whole."""

    target: Path
    """The folder that it will be."""
    partial: Path
    """Where it is written."""
    plans: Sequence[Plan]
    """Who writes what."""
    companions: Companions
    """What rank 0 writes beside the tensors."""


class Saving:
    """Saves the checkpoints of a run, one at a time. All ranks call the same methods in the same order.

    Used as a context manager it ends with the last checkpoint whole. An error of one rank is raised on all of them, by
    the next method that meets the others.

    Args:
        keeping: the run folder, and what stays there.
        rank: number of this process.
        ranks: how many there are.
        max_shard_bytes: a shard is cut before it grows beyond this.
    """

    def __init__(self, keeping: Keeping, rank: int, ranks: int, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.keeping, self.rank, self.ranks, self.max_shard_bytes = keeping, rank, ranks, max_shard_bytes
        self._offers: dict[str, Offers] = {}
        self._plans: list[Plan] = []
        self._snapshots = {MODEL: Snapshot(), OPTIMIZER: Snapshot()}
        self._begun: _Begun | None = None
        self._writing: Work[dict[str, FileRecord]] | None = None
        self._finishing: Work[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif (isinstance(value, VlmoeError) and value.of_all) or (isinstance(value, Exception) and self.ranks == 1):
            # With an error of its own a rank leaves alone, and would wait for the rest.
            with suppress(VlmoeError):
                self.finish()

    def begin(
        self,
        companions: Companions,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        shares: Mapping[str, Share],
    ) -> None:
        """Begin a checkpoint, once the one before is whole. On return the tensors may change again.

        Args:
            companions: what rank 0 writes beside the tensors.
            model: the model's state, as this rank holds it.
            optimizer: the optimiser's, from `named_optimizer_state`.
            shares: which experts this rank holds, from `expert_shares`.

        Raises:
            CheckpointError: on all ranks, if one of them could not write the checkpoint before, or begin this one.
            TrainError: likewise, if an old checkpoint could not be removed.
        """
        self.finish()
        tensors = {MODEL: model, OPTIMIZER: optimizer}
        offers = {
            MODEL: offer(model, lambda name: share_of(name, shares)),
            OPTIMIZER: offer(optimizer, lambda name: share_of(name.partition(".")[2], shares)),
        }
        plans = self._agree(offers)
        target = step_folder(self.keeping.run, companions.state.step)
        partial = from_main(on_main(lambda: open_checkpoint(target)))
        copies = {
            plan.stem: self._snapshots[plan.stem].take(
                tensors[plan.stem], offers[plan.stem], plan.owned(self.rank), plan.written
            )
            for plan in plans
        }
        self._begun = _Begun(target, partial, plans, companions)
        self._writing = Work(lambda: _write(partial, plans, self.rank, copies), "checkpoint, tensors")

    def tell(self) -> dict[str, float]:
        """What this rank tells the others at a step: its tensors are written, or could not be; all is done."""
        return {
            "written": float(self._writing is not None and self._writing.done),
            "whole": float(self._finishing is not None and self._finishing.done),
        }

    def hear(self, told: Mapping[str, float]) -> None:
        """Go on, given the sums over the ranks of what they told at the step that is over; errors as `begin`."""
        if told["written"] == self.ranks:
            self._gather()
        elif told["whole"]:
            self._end()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is whole; errors as `begin`."""
        if self._writing is not None:
            self._gather()
        if self._begun is not None:
            self._end()

    def _agree(self, offers: dict[str, Offers]) -> list[Plan]:
        """Who writes what: as at the save before, unless some rank has other tensors now."""
        if any(gather_objects(offers != self._offers)):
            told = gather_objects(offers)
            self._plans = [make_plan(stem, [one[stem] for one in told], self.max_shard_bytes) for stem in offers]
            self._offers = offers
        return self._plans

    def _gather(self) -> None:
        """Rank 0 learns what the others have written, and begins to make the checkpoint whole."""
        begun, writing = self._begun, self._writing
        assert begun is not None and writing is not None, "there is one to wait for"
        self._writing = None
        outcome = writing.outcome()
        outcomes = gather_objects(_refusal(begun.target, outcome) if isinstance(outcome, Exception) else outcome)
        failures = [found for found in outcomes if isinstance(found, CheckpointError)]
        if failures:
            self._begun = None
            if self.rank == 0:
                shutil.rmtree(begun.partial, ignore_errors=True)
            raise of_all(failures[0]) from (outcome if isinstance(outcome, Exception) else None)
        records = {name: record for found in outcomes if isinstance(found, dict) for name, record in found.items()}
        if self.rank == 0:
            self._finishing = Work(lambda: _finish(begun, records, self.keeping), "checkpoint, the rest")

    def _end(self) -> None:
        """Wait for rank 0 to make the checkpoint whole."""
        begun, finishing = self._begun, self._finishing
        self._begun, self._finishing = None, None

        def end() -> None:
            assert begun is not None and finishing is not None, "there is one to wait for"
            outcome = finishing.outcome()
            if isinstance(outcome, TrainError):
                raise outcome
            if isinstance(outcome, Exception):
                shutil.rmtree(begun.partial, ignore_errors=True)
                raise _refusal(begun.target, outcome) from outcome
            self.keeping.saved(begun.target)

        on_main(end)


def _write(
    partial: Path, plans: Sequence[Plan], rank: int, copies: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, FileRecord]:
    """Write what a rank owns."""
    if not partial.is_dir():
        raise CheckpointError(f"process {rank} does not find {partial.name}: all machines of a run must share its disk")
    records: dict[str, FileRecord] = {}
    for plan in plans:
        records |= write_files(partial, plan.files[rank], copies[plan.stem])
    return records


def _finish(begun: _Begun, records: Mapping[str, FileRecord], keeping: Keeping) -> None:
    """Make a checkpoint whole, and remove those that are no longer kept."""
    finish_checkpoint(begun.partial, begun.target, begun.plans, begun.companions, records)
    try:
        prune(keeping.run, keeping.keep_last, begun.companions.state.best_step, keeping.held())
    except OSError as error:
        raise TrainError(f"{begun.target} is whole, but older ones could not be removed: {error}") from error


def _refusal(target: Path, error: Exception) -> CheckpointError:
    """What a user is told of an error, on any rank."""
    return CheckpointError(f"{target} could not be written: {error}{UNTOUCHED}")
