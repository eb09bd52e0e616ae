"""What the exported models answer.

Axis letters: S sequences, I images, P patches, L places of a text, N tokens of an image, D width, V words, C codes.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class VLMoEOutput(ModelOutput):
    """Final states of the encoder."""

    last_hidden_state: Tensor | None = None
    """(S, N + L, D): the tokens of the image, then those of the text; 0 where no token stands."""
    pooler_output: Tensor | None = None
    """(S, D): [CLS] of the image; of the text where there is no image."""
    image_hidden_state: Tensor | None = None
    """(I, N, D): [CLS] and patches."""
    text_hidden_state: Tensor | None = None
    """(S, L, D): 0 where no token stands."""


@dataclass
class VLMoEMaskedOutput(ModelOutput):
    """What masked modelling predicts."""

    loss: Tensor | None = None
    """Mean cross-entropy of the labelled words, plus that of the labelled patches."""
    logits: Tensor | None = None
    """(S, L, V) of the words; 0 where no token stands."""
    patch_logits: Tensor | None = None
    """(I, P, C) of the visual codes."""


@dataclass
class VLMoERetrievalOutput(ModelOutput):
    """Images and texts encoded alone, and compared."""

    logits_per_image: Tensor | None = None
    """(I, S): scaled cosines."""
    logits_per_text: Tensor | None = None
    """(S, I)."""
    image_embeds: Tensor | None = None
    """(I, D) unit vectors."""
    text_embeds: Tensor | None = None
    """(S, D) unit vectors."""
