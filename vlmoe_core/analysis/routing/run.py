"""Route a model's examples and count: what `vlmoe route-stats` does, on any number of processes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmoe_core.analysis.routing.compare import Crosses
from vlmoe_core.analysis.routing.measures import compare
from vlmoe_core.analysis.routing.pictures import (
    ExampleCollector,
    Held,
    LikedPatch,
    PatchCollector,
    Picture,
    Place,
    TracedExample,
)
from vlmoe_core.analysis.routing.raw import Write, columns_of
from vlmoe_core.analysis.routing.request import Request, dataset_of
from vlmoe_core.analysis.routing.summarise import Counted, counted, merge, summarise
from vlmoe_core.analysis.routing.summary import RoutingSummary
from vlmoe_core.analysis.routing.tables import Cell
from vlmoe_core.analysis.routing.tokens import SpecialIds, stream_of
from vlmoe_core.analysis.routing.trace import Trace, encoder_of
from vlmoe_core.checkpoint.layout import name_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.data.loader import MicroBatch, MicroBatches, load_all
from vlmoe_core.errors import UsageError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.objectives.contrastive import alone
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.evaluate import draw_as_held_out
from vlmoe_core.train.parallel import gather_on_main, refuse_broken, started_processes
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.trained import Trained

PATCHES = 8
"""Liked patches of each expert."""


@dataclass(frozen=True)
class Process:
    """A process's place among those that share the examples."""

    device: torch.device
    """Where it computes."""
    rank: int = 0
    """Its number."""
    ranks: int = 1
    """How many there are."""


@dataclass(frozen=True)
class Found:
    """What the experts of a model do."""

    summary: RoutingSummary
    """In numbers."""
    patches: tuple[LikedPatch, ...]
    """What the experts of vision like most."""
    examples: tuple[TracedExample, ...]
    """Examples with their experts."""


@torch.no_grad()
def route(
    request: Request, other: Trained | None, process: Process, reporter: Reporter, write: Write | None = None
) -> Found | None:
    """Route every example that is asked for, and count. Null on all processes but the first.

    Args:
        request: the model and the examples.
        other: a second model that routes the same batches.
        process: its place among those that share the examples.
        reporter: is told how far it is.
        write: is given every token of the raw trace that this process makes; null: nobody is.

    Raises:
        DataError: an example is broken and `data.on_error` is `raise`.
        UsageError: the other model reads words or pictures in another way.
    """
    if other is not None:
        _refuse_unlike(request.trained, other)
    dataset = dataset_of(request)
    counts = _Counts.of(request, write)
    encoders = [encoder_of(one.objective).to(process.device) for one in (request.trained, other) if one is not None]
    broken: list[str] = []
    for micro in _micros(request, dataset, process, reporter):
        broken.extend(micro.broken)
        draw_as_held_out(micro.number)
        for batch, names in _views(micro, request):
            counts.add(batch.to(process.device), names, encoders)
    if request.recipe.data.on_error == "raise":
        refuse_broken(broken)
    parts = gather_on_main(counts.part())
    return _found(request, other, counts, parts, _groups(request, dataset)) if parts else None


def _refuse_unlike(first: Trained, second: Trained) -> None:
    ours, theirs = first.tokenizers.text.fingerprint, second.tokenizers.text.fingerprint
    sizes = [(one.recipe.model.image_size, one.recipe.model.patch_size) for one in (first, second)]
    if ours != theirs or sizes[0] != sizes[1]:
        raise UsageError(
            f"{second.path} can't be compared: it has another text tokenizer, image_size or patch_size, so the two "
            "models do not read the same tokens; compare checkpoints of one run, or runs that share their tokenizers"
        )
    positions = [one.recipe.model.max_text_length for one in (first, second)]
    if positions[1] < positions[0]:
        lengths = f"{positions[1]} tokens of a text, not {positions[0]}"
        raise UsageError(f"{second.path} can't be compared: it reads {lengths}")
    if not _sites(first.recipe.model) & _sites(second.recipe.model):
        raise UsageError(f"{second.path} can't be compared: the two models have no sparse layer in common")


def _sites(model: ModelConfig) -> set[tuple[str, int]]:
    """Modality and 0-based block of every sparse layer."""
    own = {"vision": ("vision",), "text": ("text",), "shared": ("vision", "text")}
    return {(modality, layer) for pool in model.pools for modality in own[pool] for layer in model.sparse_layers(pool)}


def _micros(request: Request, dataset: MicroBatches, process: Process, reporter: Reporter) -> Iterator[MicroBatch]:
    """This process's share of the groups; tells how many are done."""
    numbers = range(process.rank, dataset.num_micros, process.ranks)
    reporter.counted(len(numbers))
    micros = load_all(dataset, numbers, request.recipe.data, started_processes("LOCAL_WORLD_SIZE"))
    for done, micro in enumerate(micros, start=1):
        yield micro
        reporter.advanced(done)


def _views(micro: MicroBatch, request: Request) -> Iterator[tuple[Batch, Sequence[str]]]:
    """What the encoder is given of one group, and the names of the examples."""
    names, start = [record.name for record in micro.records], 0
    for stream in STREAMS:
        batch = micro.batches.get(stream)
        if batch is None or not batch.num_examples:
            continue
        own, start = names[start : start + batch.num_examples], start + batch.num_examples
        seen: Mapping[StreamName, Batch] = {stream: batch}
        if set(request.tasks) - {stream} and request.recipe.task is not None:
            seen = {**alone(batch), stream: batch}
        yield from ((one, own) for name, one in seen.items() if name in request.tasks)


@dataclass
class _Counts:
    """What is collected of the forward passes."""

    trace: Trace
    patches: PatchCollector
    examples: ExampleCollector
    crosses: Crosses
    read: Counter[StreamName]
    write: Write | None

    @classmethod
    def of(cls, request: Request, write: Write | None) -> "_Counts":
        trained = request.trained
        text, encoder = trained.tokenizers.text, encoder_of(trained.objective)
        special = SpecialIds(text.sep_id, text.pad_id)
        words, classes = encoder.vocab_size, len(request.labels.names)
        trace = Trace(encoder.config, words, request.tasks, special, classes)
        examples = ExampleCollector(trace, text.pieces)
        return cls(trace, PatchCollector(trace, PATCHES), examples, Crosses(), Counter(), write)

    def add(self, batch: Batch, names: Sequence[str], encoders: Sequence[torch.nn.Module]) -> None:
        """Route one batch by the model, and by the other one."""
        encoded = encoders[0](batch)
        self.trace.receive(batch, encoded)
        self.patches.receive(batch, encoded, names)
        self.examples.receive(batch, encoded, names)
        if len(encoders) > 1:
            beside = self.trace.rows(batch, encoders[1](batch))
            self.crosses.add(list(self.trace.rows(batch, encoded)), list(beside))
        self.read[stream_of(batch)] += batch.num_examples
        if self.write is not None:
            for rows in self.trace.rows(batch, encoded):
                self.write(columns_of(rows, batch, names, self.examples.pieces))

    def part(self) -> "_Part":
        """What this process found, to be sent to the first one."""
        crosses = {cell: cross.cpu() for cell, cross in self.crosses.tables.items()}
        return _Part(counted(self.trace), crosses, self.patches.held, self.examples.examples(), self.read)


@dataclass(frozen=True)
class _Part:
    """What one process found."""

    counted: Counted
    crosses: Mapping[Cell, Tensor]
    patches: Mapping[Place, Mapping[Picture, Held]]
    examples: tuple[TracedExample, ...]
    read: Counter[StreamName]


def _groups(request: Request, dataset: MicroBatches) -> dict[StreamName, int]:
    """Examples of each stream that the encoder sees in a routing group."""
    task = request.recipe.task
    source = {stream: open_task(task).stream if task else stream for stream in request.tasks}
    return {stream: dataset.sizes[own] for stream, own in source.items() if own in dataset.sizes}


def _found(
    request: Request, other: Trained | None, counts: _Counts, parts: Sequence[_Part], groups: Mapping[StreamName, int]
) -> Found:
    tables, flows, pools = merge([part.counted for part in parts])
    trace = replace(counts.trace, tables=dict(tables), flows=dict(flows), pools=dict(pools))
    trained = request.trained
    crosses = _summed([part.crosses for part in parts])
    read: Counter[StreamName] = sum((part.read for part in parts), Counter())
    summary = RoutingSummary(
        model=name_of(trained.path),
        step=trained.step,
        data=f"data.{request.split} of {request.data}",
        capacity=request.capacity,
        group={stream: groups[stream] for stream in read},
        examples={stream: count for stream, count in read.items()},
        cells=summarise(trace, trained.tokenizers.text.pieces),
        other=name_of(other.path) if other is not None else None,
        comparison=[compare(cell, table.numpy()) for cell, table in sorted(crosses.items())],
    )
    for part in parts[1:]:
        counts.patches.absorb(part.patches)
    shown = sorted(parts[0].examples, key=lambda one: one.image is None or not one.words)  # pairs first
    return Found(summary, counts.patches.liked(), tuple(shown))


def _summed(parts: Sequence[Mapping[Cell, Tensor]]) -> dict[Cell, Tensor]:
    total: dict[Cell, Tensor] = {}
    for part in parts:
        for cell, table in part.items():
            total[cell] = total[cell] + table if cell in total else table
    return total
