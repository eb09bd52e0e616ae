"""From a recipe to the things that a run is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from vlmoe_core.config import plugin_module
from vlmoe_core.data.config import STREAMS, SplitConfig, StreamName
from vlmoe_core.data.example import TextEncoder
from vlmoe_core.data.loader import MicroBatches
from vlmoe_core.data.prepare import Corruption, NothingHidden, Preparer, build_preparer
from vlmoe_core.data.stream import WholeStream, open_streams
from vlmoe_core.model.block import Block
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.objectives.masking import Masking
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS, Labels
from vlmoe_core.tasks.task import Task, open_task
from vlmoe_core.tokenizers.online import OnlineTokenizer
from vlmoe_core.tokenizers.visual import VisualTokenizer
from vlmoe_core.train.fitting import Tokenizers
from vlmoe_core.train.stand_ins import UnreadText

HELD_OUT_SEED = 0
VARIANTS_OF_A_BLOCK = 32
BASELINE_EXAMPLES = 4
"""Training micro-batches for each held-out one, from which word and code frequencies are counted."""


def build_objective(recipe: Recipe, visual: VisualTokenizer | None, labels: Labels = NO_LABELS) -> nn.Module:
    """The objective with freshly initialised weights, drawn from the recipe's seed.

    Args:
        recipe: the run.
        visual: the visual tokenizer; null in a task, where no image ever comes or its codes are stored, or where only
            shapes matter.
        labels: what the head of a task chooses from.
    """
    torch.manual_seed(recipe.seed)
    words, codes = recipe.tokenizers.text.vocab_size, recipe.tokenizers.visual.codebook_size
    encoder = Encoder(recipe.model, words, recompute=recipe.train.activation_checkpointing)
    if recipe.task is not None:
        objective = open_task(recipe.task).build(encoder, labels)
    else:
        assert recipe.objective is not None, "a recipe pretrains or finetunes"
        module = plugin_module("vlmoe_core.objectives.kinds", recipe.objective.name)
        coder = None if visual is None else OnlineTokenizer(visual, recipe.tokenizers.visual.precision)
        objective = module.build(recipe.objective, encoder, words, codes, coder)
    _freeze(encoder, recipe.train.freeze)
    return objective


def _freeze(encoder: Encoder, parts: Sequence[str]) -> None:
    """Leave parts of the sparse layers as they are."""
    for layer in encoder.modules():
        if isinstance(layer, SparseFFN):
            named: dict[str, nn.Module] = {"routers": layer.router, "experts": layer.experts}
            for part in parts:
                named[part].requires_grad_(False)


def compile_blocks(objective: nn.Module) -> None:
    """Compile each block: a variant for each stream in training and in evaluation, with and without a mask.

    Those of a frozen visual tokenizer, which have no parameters, stay as they are: rounding differently, they would
    give some patches other codes than the stored ones.

    Torch allows 8 variants for all blocks together, whose code is one function; beyond that it would go on uncompiled
    with no more than a warning.
    """
    limits = torch._dynamo.config
    blocks = [m for m in objective.modules() if isinstance(m, Block) and next(m.parameters(), None) is not None]
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS_OF_A_BLOCK * len(blocks))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
    for block in blocks:
        block.compile(dynamic=True)


def build_dataset(recipe: Recipe, split: SplitConfig, tokenizers: Tokenizers, training: bool) -> MicroBatches:
    """The micro-batches of a split: the training data in the recipe's order, or the held-out examples.

    Raises:
        DataError: a source is missing or empty.
    """
    if recipe.task is not None:
        return _task_dataset(recipe, open_task(recipe.task), split, tokenizers, training)
    return _pretraining_dataset(recipe, split, tokenizers.text, training)


def build_image_dataset(recipe: Recipe, split: SplitConfig, training: bool) -> MicroBatches:
    """The streams with images of `build_dataset`, with the same pixels at the same places; texts are not read.

    Raises:
        DataError: a source is missing or empty.
    """
    pictured = split.model_copy(update={"text": ()})
    return _pretraining_dataset(recipe, pictured, UnreadText(recipe.tokenizers.text.vocab_size), training)


def _pretraining_dataset(recipe: Recipe, split: SplitConfig, encoder: TextEncoder, training: bool) -> MicroBatches:
    return MicroBatches(
        streams=open_streams(recipe.data, split, recipe.seed if training else HELD_OUT_SEED, encoder),
        sizes=micro_sizes(recipe, split),
        preparer=recipe_preparer(recipe, encoder, NO_LABELS, training),
        image_size=recipe.model.image_size,
        num_patches=recipe.model.num_patches,
        limit=None if training else recipe.train.eval_examples,
    )


def _task_dataset(
    recipe: Recipe, task: Task, split: SplitConfig, tokenizers: Tokenizers, training: bool
) -> MicroBatches:
    """The micro-batches of a task's one stream; sources of other streams are not opened."""
    split = split.model_copy(update={name: () for name in STREAMS if name != task.stream})
    return MicroBatches(
        streams=open_streams(recipe.data, split, recipe.seed if training else HELD_OUT_SEED, tokenizers.text),
        sizes=micro_sizes(recipe, split),
        preparer=recipe_preparer(recipe, tokenizers.text, tokenizers.labels, training),
        image_size=recipe.model.image_size,
        num_patches=recipe.model.num_patches,
        limit=None if training else recipe.train.eval_examples,
        names=(task.stream,),
        recorded=not training,
    )


def whole_dataset(recipe: Recipe, split: SplitConfig, tokenizers: Tokenizers, limit: int | None) -> MicroBatches:
    """Every example of a split once, to score a task on; at most `limit` of them, in the held-out order."""
    assert recipe.task is not None
    task = open_task(recipe.task)
    dataset = _task_dataset(recipe, task, split, tokenizers, training=False)
    whole = WholeStream(task.stream, dataset.streams[task.stream].sources)
    if limit is not None and limit < whole.epoch:
        return replace(dataset, limit=limit)
    return replace(dataset, streams={task.stream: whole}, limit=whole.epoch)


def recipe_preparer(recipe: Recipe, encoder: TextEncoder, labels: Labels, training: bool) -> Preparer:
    """Makes samples as the recipe asks for: words and patches are hidden, or what a task must predict is told."""
    corruption: Corruption = NothingHidden(recipe.model.num_patches)
    if recipe.hides:
        corruption = Masking.of(recipe.mask, recipe.model.grid, encoder)
    task = None if recipe.task is None else open_task(recipe.task)
    target = None if task is None else partial(task.checked_target, labels=labels, training=training)
    return build_preparer(recipe.data, recipe.model.image_size, encoder, corruption, training, target)


def micro_sizes(recipe: Recipe, split: SplitConfig) -> Mapping[StreamName, int]:
    """Examples of each stream of a split in a micro-batch; as many as of the largest where training has none of it."""
    micro = recipe.batch.micro
    largest = max(micro.of(stream) for stream in STREAMS)
    return {stream: micro.of(stream) or largest for stream in STREAMS if getattr(split, stream)}
