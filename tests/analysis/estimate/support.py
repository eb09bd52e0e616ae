"""Recipes for estimates, and real micro-batches of the sizes that they speak of."""

from dataclasses import replace
from typing import Any

import torch

from vlmoe_core.analysis.estimate.inputs import blank_batch, hidden_of, streams_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.recipe.config import Recipe

SCENES = [{"source": "scenes"}]


def recipe_of(
    model: dict[str, Any],
    micro: int = 2,
    num_micro: int = 1,
    streams: tuple[StreamName, ...] = STREAMS,
    vocab_size: int = 300,
    codes: int = 64,
    max_text: dict[str, int] | None = None,
    train: dict[str, Any] | None = None,
    **more: Any,
) -> Recipe:
    """Masked modelling, unless `more` says a task."""
    values = {
        "model": model,
        "tokenizers": {"text": {"vocab_size": vocab_size}, "visual": {"codebook_size": codes}},
        "data": {"train": dict.fromkeys(streams, SCENES), "max_text": max_text or {"text": 128, "pair": 64}},
        "batch": {
            "size": dict.fromkeys(streams, micro * num_micro),
            "micro": dict.fromkeys(streams, micro),
        },
        "train": {"steps": 10, **(train or {})},
        **({} if "task" in more else {"objective": {"name": "masked"}}),
    }
    return Recipe.model_validate({**values, **more})


def tokenizer_recipe() -> Recipe:
    """Training of a visual tokenizer."""
    return recipe_of(
        {"preset": "tiny", "vl_layers": 0, "modality": "vision"},
        streams=("image",),
        objective={"name": "vqkd", "code_dim": 16, "decoder_layers": 2},
    )


def real_batch(recipe: Recipe, stream: StreamName) -> Batch:
    """The same shapes as `blank_batch`, with pixels, words and masks."""
    blank = blank_batch(recipe, stream, recipe.batch.micro.of(stream))
    sequences, length, hidden = blank.num_sequences, recipe.tokens(stream)[1], hidden_of(recipe, stream)
    target_SL = torch.full((sequences, length), -1)
    target_SL[:, 1 : 1 + hidden.words] = 7
    mask_IP = torch.zeros_like(blank.patch_mask_IP)
    mask_IP[:, : hidden.patches] = True
    number_S = torch.arange(sequences)
    return replace(
        blank,
        pixels_ICHW=torch.randint(0, 256, blank.pixels_ICHW.shape, dtype=torch.uint8),
        patch_mask_IP=mask_IP,
        image_ids=number_S[: blank.num_images],
        sequence_of_image=number_S[: blank.num_images],
        text_ids_T=torch.randint(5, recipe.tokenizers.text.vocab_size, (sequences * length,)),
        text_targets_T=target_SL.flatten(),
        text_positions_T=torch.arange(length).repeat(sequences),
        sequence_of_text=number_S.repeat_interleave(length),
        example_of_sequence=number_S,
        positions=number_S,
    )


def real_batches(recipe: Recipe) -> dict[StreamName, Batch]:
    """The micro-batch of a recipe."""
    torch.manual_seed(0)
    return {stream: real_batch(recipe, stream) for stream in streams_of(recipe)}
