"""Micro-batches by number, made ahead by worker processes."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch.utils.data import DataLoader, Dataset

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.codes import StoredCodes
from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import STREAMS, DataConfig, StreamName
from vlmoe_core.data.example import Example, Record, Sample
from vlmoe_core.data.prepare import Preparer
from vlmoe_core.data.stream import Stream, WholeStream
from vlmoe_core.errors import DataError, TokenizerError


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of every stream; a stream that the run does not have is an empty batch."""

    number: int
    """Its number in the run, counted over all ranks: step * M + m."""
    batches: Mapping[StreamName, Batch]
    """The batch of each stream."""
    broken: tuple[str, ...]
    """Messages of the broken examples, whose places are empty."""
    records: tuple[Record, ...] = ()
    """What scoring needs of the examples, in their order, where it was asked for."""
    refused: str | None = None
    """Why stored codes don't belong to the examples; its batches are empty then."""


@dataclass(frozen=True)
class MicroBatches(Dataset[MicroBatch]):
    """Micro-batches of a split: number n holds the positions n * size to (n + 1) * size of each stream."""

    streams: Mapping[StreamName, Stream | WholeStream]
    """The opened streams."""
    sizes: Mapping[StreamName, int]
    """Examples of each stream in a micro-batch."""
    preparer: Preparer
    """Makes samples of examples."""
    image_size: int
    """Pixels along an image's side."""
    num_patches: int
    """Patches of an image."""
    limit: int | None = None
    """Positions from this one on are left empty (held-out data); null: none."""
    names: tuple[StreamName, ...] = STREAMS
    """The streams of a micro-batch: all, those without sources empty; or the one stream of a task."""
    recorded: bool = False
    """Whether micro-batches carry the records of their examples."""
    codes: Mapping[StreamName, StoredCodes] = field(default_factory=dict)
    """Stored visual codes of the streams with images; none: they are made in the step."""

    @property
    def num_micros(self) -> int:
        """Micro-batches of held-out data: of the stream that has the most of them."""
        counts = [-(-min(self.limit or 0, s.epoch) // self.sizes[n]) for n, s in self.streams.items()]
        return max(counts, default=0)

    def __getitem__(self, number: int) -> MicroBatch:
        """The micro-batch of that number."""
        drawn = Drawn()
        refused = None
        try:
            samples = {name: self._samples(name, number, drawn) for name in self.names}
        except TokenizerError as error:
            samples, refused = {name: [] for name in self.names}, str(error)
        batches = {name: collate(name, some, self.image_size, self.num_patches) for name, some in samples.items()}
        return MicroBatch(number, batches, tuple(drawn.broken), tuple(drawn.records), refused)

    def _samples(self, name: StreamName, number: int, drawn: "Drawn") -> list[Sample]:
        if name not in self.streams:
            return []
        stream, size = self.streams[name], self.sizes[name]
        last = (number + 1) * size
        if self.limit is not None:
            last = min(last, self.limit, stream.epoch)
        samples = []
        for position in range(number * size, last):
            try:
                example = stream[position]
                sample = self.preparer(name, position, example, stream.random(position))
            except DataError as error:
                drawn.broken.append(f"{error} (position {position} of the {name} stream)")
                continue
            samples.append(self._with_codes(name, sample))
            if self.recorded:
                drawn.records.append(_record(position, example))
        return samples

    def _with_codes(self, name: StreamName, sample: Sample) -> Sample:
        """Raises TokenizerError where the stored codes are of another crop."""
        return replace(sample, codes=self.codes[name].of(sample)) if name in self.codes else sample


@dataclass(frozen=True)
class Drawn:
    """What is collected beside the samples of a micro-batch."""

    broken: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def _record(position: int, example: Example) -> Record:
    return Record(position, example.name, example.image_id, example.words, example.second_text or "", example.facts)


def load(dataset: MicroBatches, numbers: Iterable[int], data: DataConfig, processes: int = 1) -> Iterator[MicroBatch]:
    """The micro-batches of the given numbers, in order, made ahead by worker processes.

    Args:
        dataset: what makes them.
        numbers: which ones.
        data: workers, prefetch and what to do with broken examples.
        processes: ranks on this machine, which share its cores.

    Raises:
        DataError: an example is broken and `data.on_error` is `raise`.
        TokenizerError: stored codes are of other pixels.
    """
    for micro in map(accepted, load_all(dataset, numbers, data, processes)):
        if micro.broken and data.on_error == "raise":
            raise DataError(f"{micro.broken[0]}; mend it, or set data.on_error=skip to leave its place empty")
        yield micro


def load_all(
    dataset: MicroBatches, numbers: Iterable[int], data: DataConfig, processes: int = 1
) -> Iterator[MicroBatch]:
    """The same, but not yet `accepted`, and whatever `data.on_error` says: for ranks that must refuse together."""
    workers = count_workers(data, processes)
    loader: DataLoader[MicroBatch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=data.prefetch if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=False,
    )
    with _signals_blocked():
        return iter(loader)


def accepted(micro: MicroBatch) -> MicroBatch:
    """The micro-batch. Raises TokenizerError where stored codes don't belong to it."""
    if micro.refused is not None:
        raise TokenizerError(micro.refused)
    return micro


def count_workers(data: DataConfig, processes: int = 1) -> int:
    """Loader processes of one rank."""
    if data.workers != "auto":
        return data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(0, cores // processes - 1))


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started meanwhile never see the signals that end a run, which launchers and terminals send to all.

    They leave them to the training process, which finishes its step and ends the workers itself. A worker can't do
    that of its own: a signal may come before its first line.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
