"""From a recipe to the things that a run is made of."""

from collections.abc import Mapping

import torch
from torch import nn

from vlmoe_core.config import plugin_module
from vlmoe_core.data.config import STREAMS, SplitConfig, StreamName
from vlmoe_core.data.loader import MicroBatches
from vlmoe_core.data.prepare import build_preparer
from vlmoe_core.data.stream import open_streams
from vlmoe_core.model.block import Block
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.objectives.masking import Masking
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tokenizers.visual import VisualTokenizer
from vlmoe_core.train.fitting import Tokenizers

HELD_OUT_SEED = 0
VARIANTS_OF_A_BLOCK = 32


def build_objective(recipe: Recipe, visual: VisualTokenizer | None) -> nn.Module:
    """The objective with freshly initialised weights, drawn from the recipe's seed.

    Args:
        recipe: the run.
        visual: the visual tokenizer; null where no image ever comes, or where only shapes matter.
    """
    torch.manual_seed(recipe.seed)
    words, codes = recipe.tokenizers.text.vocab_size, recipe.tokenizers.visual.codebook_size
    encoder = Encoder(recipe.model, words, recompute=recipe.train.activation_checkpointing)
    module = plugin_module("vlmoe_core.objectives.kinds", recipe.objective.name)
    objective: nn.Module = module.build(recipe.objective, encoder, words, codes, visual)
    return objective


def compile_blocks(objective: nn.Module) -> None:
    """Compile each block: a variant for each stream in training and in evaluation, with and without a mask.

    Torch allows 8 variants for all blocks together, whose code is one function; beyond that it would go on uncompiled
    with no more than a warning.
    """
    limits = torch._dynamo.config
    blocks = [module for module in objective.modules() if isinstance(module, Block)]
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS_OF_A_BLOCK * len(blocks))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)
    for block in blocks:
        block.compile(dynamic=True)


def build_dataset(recipe: Recipe, split: SplitConfig, tokenizers: Tokenizers, training: bool) -> MicroBatches:
    """The micro-batches of a split: the training data in the recipe's order, or the held-out examples.

    Raises:
        DataError: a source is missing or empty.
    """
    masking = Masking.of(recipe.mask, recipe.model.grid, tokenizers.text)
    return MicroBatches(
        streams=open_streams(recipe.data, split, recipe.seed if training else HELD_OUT_SEED, tokenizers.text),
        sizes=micro_sizes(recipe, split),
        preparer=build_preparer(recipe.data, recipe.model.image_size, tokenizers.text, masking, training),
        image_size=recipe.model.image_size,
        num_patches=recipe.model.num_patches,
        limit=None if training else recipe.train.eval_examples,
    )


def micro_sizes(recipe: Recipe, split: SplitConfig) -> Mapping[StreamName, int]:
    """Examples of each stream of a split in a micro-batch; as many as of the largest where training has none of it."""
    micro = recipe.batch.micro
    largest = max(micro.of(stream) for stream in STREAMS)
    return {stream: micro.of(stream) or largest for stream in STREAMS if getattr(split, stream)}
