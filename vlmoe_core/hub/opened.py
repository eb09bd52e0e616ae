"""The module that a model's recipe describes: an objective, or an imported encoder that has none."""

from torch import nn

from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.fitting import Tokenizers


class EncoderAlone(nn.Module):
    """An imported encoder, its tensors named as in an objective."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder


def build_model(recipe: ModelRecipe, tokenizers: Tokenizers | None) -> nn.Module:
    """The objective of a recipe, or the encoder of one that has none, freshly initialised, in evaluation mode."""
    if isinstance(recipe, Recipe) and tokenizers is not None:
        return build_objective(recipe, tokenizers.visual, tokenizers.labels).eval()
    return EncoderAlone(Encoder(recipe.model, recipe.tokenizers.text.vocab_size)).eval()
