"""Real examples on which an export is compared with its model."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import STREAMS, SplitConfig, StreamName
from vlmoe_core.data.example import Example
from vlmoe_core.data.prepare import NothingHidden, build_preparer
from vlmoe_core.data.stream import open_streams
from vlmoe_core.errors import DataError
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import HELD_OUT_SEED
from vlmoe_core.train.trained import Trained

Samples = Mapping[StreamName, Sequence[Example]]
"""Examples of each stream that the model was trained on."""


def samples_of(trained: Trained, limit: int) -> Samples:
    """The first examples of the model's own data, at most `limit` of each stream; broken ones are left out.

    They are held-out ones; of a stream that has none, those that the model was trained on.

    Raises DataError for a stream without any: what the model makes of it could not be compared.
    """
    data, names = trained.recipe.data, _streams_of(trained)
    split = SplitConfig(**{name: getattr(data.eval, name) or getattr(data.train, name) for name in names})
    streams = open_streams(data, split, HELD_OUT_SEED, trained.tokenizers.text)
    found: dict[StreamName, list[Example]] = {}
    for name in names:
        stream = streams.get(name)
        examples = [] if stream is None else [stream[position] for position in range(min(limit, stream.epoch))]
        found[name] = [example for example in examples if _is_readable(trained, name, example)]
        if not found[name]:
            raise DataError(
                f"an export is compared with its model on examples, but data.eval.{name} and data.train.{name} give "
                "none that can be read; name other data with --data RECIPE"
            )
    return found


def _streams_of(trained: Trained) -> tuple[StreamName, ...]:
    """What the model was trained on."""
    recipe = trained.recipe
    if recipe.task is not None:
        return (open_task(recipe.task).stream,)
    return tuple(name for name in STREAMS if recipe.batch.size.of(name))


def batch_of(trained: Trained, stream: StreamName, examples: Sequence[Example]) -> Batch:
    """The examples as held-out data are read, nothing hidden."""
    model, data = trained.recipe.model, trained.recipe.data
    nothing = NothingHidden(model.num_patches)
    preparer = build_preparer(data, model.image_size, trained.tokenizers.text, nothing, training=False)
    samples = [preparer(stream, n, example, random.Random(0)) for n, example in enumerate(examples)]
    return collate(stream, samples, model.image_size, model.num_patches)


def in_words(trained: Trained, examples: Sequence[Example]) -> list[Example]:
    """The examples with their texts as words, also where a file stores token ids."""
    decode = trained.tokenizers.text.decode
    return [e if e.text_ids is None else replace(e, text=decode(e.text_ids), text_ids=None) for e in examples]


def _is_readable(trained: Trained, stream: StreamName, example: Example) -> bool:
    try:
        batch_of(trained, stream, [example])
    except DataError:
        return False
    return True


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the number of threads changes the last bits of a product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
