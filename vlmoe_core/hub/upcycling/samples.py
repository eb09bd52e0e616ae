"""The examples on which an upcycled model is compared with the dense one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlmoe_core.data.config import STREAMS, DataConfig, StreamName
from vlmoe_core.data.loader import MicroBatch, MicroBatches, load
from vlmoe_core.data.prepare import NothingHidden, build_preparer
from vlmoe_core.data.stream import open_streams
from vlmoe_core.errors import DataError
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.tokenizers.text import TextTokenizer, wordless_tokenizer
from vlmoe_core.train.build import HELD_OUT_SEED, build_dataset
from vlmoe_core.train.fitting import Tokenizers

SAMPLES = 64
"""At most so many examples of each stream."""
SCENE_GROUP = 32
"""Drawn examples in a routing group."""
SMALLEST_SCENE = 16
LONGEST_TEXT = 64


@dataclass(frozen=True)
class Samples:
    """Micro-batches, and where they are from."""

    told: str
    """In words, without a path of this machine."""
    micros: tuple[MicroBatch, ...]
    """At least one example in all."""
    whole: bool
    """Whether the model's own objective takes them; else the encoder alone does."""
    trouble: str | None = None
    """Why the model's held-out examples can't be read; it may name paths."""

    @property
    def examples(self) -> dict[StreamName, int]:
        """Examples of each stream."""
        counts = {s: sum(m.batches[s].num_examples for m in self.micros if s in m.batches) for s in STREAMS}
        return {stream: count for stream, count in counts.items() if count}


def samples_of(recipe: ModelRecipe, tokenizers: Tokenizers | None) -> Samples:
    """The held-out examples of the model's own recipe; drawn scenes where it names none that can be read.

    Args:
        recipe: the dense model's.
        tokenizers: its own; null: an imported encoder that came without, which is shown pictures alone.
    """
    reason, trouble = "the model names no data", None
    if isinstance(recipe, Recipe) and tokenizers is not None:
        try:
            return _held_out(recipe, tokenizers)
        except DataError as error:
            reason, trouble = "its held-out data can't be read", str(error)
    micros = _drawn_scenes(recipe, tokenizers.text if tokenizers else None)
    return Samples(f"drawn scenes, by the encoder alone ({reason})", micros, whole=False, trouble=trouble)


def _held_out(recipe: Recipe, tokenizers: Tokenizers) -> Samples:
    """Raises DataError where there is none, or none that can be read."""
    dataset = build_dataset(recipe, recipe.data.eval, tokenizers, training=False)
    micros = _read(replace(dataset, limit=SAMPLES), recipe.data)
    samples = Samples("held-out examples (data.eval)", micros, whole=True)
    if not samples.examples:
        raise DataError("data.eval has no readable example")
    return samples


def _drawn_scenes(recipe: ModelRecipe, text: TextTokenizer | None) -> tuple[MicroBatch, ...]:
    model = recipe.model
    names: tuple[StreamName, ...] = STREAMS if text else ("image",)
    source = {"source": "scenes", "split": "eval", "size": SAMPLES, "image_size": max(SMALLEST_SCENE, model.image_size)}
    split = {name: [source] for name in names}
    longest = min(LONGEST_TEXT, model.max_text_length)
    said = {"train": split, "eval": split, "max_text": {"text": longest, "pair": longest}}
    data = DataConfig.model_validate(said)
    encoder = text or wordless_tokenizer()
    sizes: Mapping[StreamName, int] = dict.fromkeys(names, SCENE_GROUP)
    dataset = MicroBatches(
        streams=open_streams(data, data.eval, HELD_OUT_SEED, encoder),
        sizes=sizes,
        preparer=build_preparer(data, model.image_size, encoder, NothingHidden(model.num_patches), training=False),
        image_size=model.image_size,
        num_patches=model.num_patches,
        limit=SAMPLES,
        names=names,
    )
    return _read(dataset, data)


def _read(dataset: MicroBatches, data: DataConfig) -> tuple[MicroBatch, ...]:
    """All micro-batches, made in this process; broken examples leave their places empty."""
    here = data.model_copy(update={"workers": 0, "on_error": "skip"})
    return tuple(load(dataset, range(dataset.num_micros), here))
