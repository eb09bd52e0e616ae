"""The micro-batch of a recipe as far as shapes go, known without reading any data."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import MODALITY
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.objectives.config import Hidden
from vlmoe_core.objectives.masking import num_masked
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.task import open_task

SPECIALS = 2
"""[CLS] and [SEP], which are never hidden."""


def streams_of(recipe: Recipe) -> tuple[StreamName, ...]:
    """The streams that a run reads."""
    if recipe.task is not None:
        return (open_task(recipe.task).stream,)
    return tuple(stream for stream in STREAMS if recipe.batch.micro.of(stream))


def pictures_of(recipe: Recipe) -> int:
    """Pictures of one example, each in a sequence of its own."""
    return int(getattr(recipe.task, "num_images", 1))


def hidden_of(recipe: Recipe, stream: StreamName) -> Hidden:
    """What is hidden of an example of a stream, its text of the greatest length."""
    if not recipe.hides:
        return Hidden()
    mask, fused = recipe.mask, stream == "pair"
    longest = 0 if stream == "image" else getattr(recipe.data.max_text, stream)
    words = num_masked(max(0, longest - SPECIALS), mask.pair_text if fused else mask.text)
    rate = mask.pair_image if fused else mask.image
    patches = 0 if stream == "text" else mask.image_count or round(rate * recipe.model.num_patches)
    return Hidden(words, patches)


def blank_batch(recipe: Recipe, stream: StreamName, examples: int, pictures: int = 1) -> Batch:
    """A batch of the stream whose tensors hold zeros: all its shapes and counts, no values that mean something.

    Its targets are absent, since what a task predicts comes from its data; hidden patches have stored codes.
    """
    (image_tokens, length), hidden = recipe.tokens(stream), hidden_of(recipe, stream)
    side, patches, sequences = recipe.model.image_size, recipe.model.num_patches, examples * pictures
    images, tokens = (sequences if image_tokens else 0), sequences * length
    return Batch(
        fused=stream == "pair",
        pixels_ICHW=torch.zeros(images, 3, side, side, dtype=torch.uint8),
        patch_mask_IP=torch.zeros(images, patches, dtype=torch.bool),
        image_ids=_numbers(images),
        sequence_of_image=_numbers(images),
        text_ids_T=_numbers(tokens),
        text_targets_T=_numbers(tokens),
        text_positions_T=_numbers(tokens),
        sequence_of_text=_numbers(tokens),
        example_of_sequence=_numbers(sequences),
        positions=_numbers(examples),
        longest_text=length if examples else 0,
        num_masked_patches=images * hidden.patches,
        num_masked_words=sequences * hidden.words,
        codes_IP=torch.zeros(images, patches, dtype=torch.int64),
        only=MODALITY[stream],
    )


def repeated(batch: Batch, times: int) -> Batch:
    """A batch with every tensor so many times: the shapes of so many batches in one."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    longer: dict[str, Any] = {
        name: torch.cat([value] * times) for name, value in values.items() if isinstance(value, Tensor)
    }
    return replace(batch, **longer)


def _numbers(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)
