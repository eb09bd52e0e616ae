"""How many parameters a recipe's model has, by its formulas."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.recipe.config import Recipe


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; equal to those of the built model."""

    total: int
    """All: encoder and heads."""
    active: int
    """Applied per token: of E experts only `top_k`, in the layers of both modalities; heads and routers whole."""
    encoder: int
    """Of the encoder."""
    encoder_active: int
    """Of the encoder, applied per token. So the paper counts its 180M of 1.9B."""
    heads: int
    """Of what stands on the encoder."""
    routers: int
    """Of all routers, which are part of the encoder."""
    paths: Mapping[StreamName, int]
    """Of the encoder, what an image alone, a text alone and a pair pass."""


def count_parameters(recipe: Recipe, built: nn.Module) -> Parameters:
    """Count by the recipe's formulas; the heads of a task, which have none, are counted in the `built` objective."""
    model, words = recipe.model, recipe.tokenizers.text.vocab_size
    encoder, active = model.num_params(words), model.num_active_params(words)
    heads = recipe.num_head_params
    if recipe.task is not None:
        heads = sum(p.numel() for name, p in built.named_parameters() if not name.startswith("encoder."))
    return Parameters(
        total=encoder + heads,
        active=active + heads,
        encoder=encoder,
        encoder_active=active,
        heads=heads,
        routers=model.num_router_params(),
        paths={stream: model.num_path_params(stream, words) for stream in _paths(model.modality)},
    )


def _paths(modality: str) -> tuple[StreamName, ...]:
    """The kinds of input that the model takes."""
    return STREAMS if modality == "both" else ("image",) if modality == "vision" else ("text",)
