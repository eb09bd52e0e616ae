"""Tracing from Python: `with trace(model) as traced: ...`, then `traced.summary()`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from vlmoe_core.analysis.routing.summarise import summarise
from vlmoe_core.analysis.routing.summary import CellSummary
from vlmoe_core.analysis.routing.tokens import SpecialIds
from vlmoe_core.analysis.routing.trace import PRETRAINING_TASKS, Trace, encoder_of, listening
from vlmoe_core.data.config import StreamName


class Traced(Trace):
    """A trace that tells what it found."""

    def summary(self, pieces: Sequence[str] | None = None) -> list[CellSummary]:
        """One entry for each task, layer and modality.

        Args:
            pieces: the text of each token id (`tokenizer.pieces`); null: neither words nor their classes are told.
        """
        return summarise(self, pieces)


@contextmanager
def trace(
    model: nn.Module,
    tasks: Mapping[StreamName, str] = PRETRAINING_TASKS,
    special: SpecialIds | None = None,
    num_classes: int = 0,
) -> Iterator[Traced]:
    """Count the routing of every forward pass inside the `with` block.

    Args:
        model: any model of this library: an encoder, or an objective with one.
        tasks: what is counted of each stream.
        special: token ids that are no words; null: [SEP] and [PAD] count as words.
        num_classes: classes of the examples, where their targets are classes.

    Raises ValueError where the model has no encoder, or several.
    """
    encoder = encoder_of(model)
    found = Traced(encoder.config, encoder.vocab_size, tasks, special, num_classes)
    with listening(model, found.receive):
        yield found
