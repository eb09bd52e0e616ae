"""What a recipe says of tokenizers."""

from typing import Literal

from pydantic import Field

from vlmoe_core.config import Config


class TextTokenizerConfig(Config):
    """Turns text into token ids."""

    load: str | None = None
    """A tokenizer.json, vocab.txt or SentencePiece .spm / .model file, a folder with one of them, or a Hub name; null:
    WordPiece is fitted on the run's own texts."""
    vocab_size: int = Field(30522, ge=16)
    """Rows of the word embedding; a tokenizer with more ids is refused, one with fewer leaves rows unused."""
    lowercase: bool = True
    """Fold case and strip accents, when fitted."""
    fit_texts: int = Field(200_000, ge=1)
    """Most texts that the fit reads, an equal share from each text and pair source."""


class VisualTokenizerConfig(Config):
    """Turns the patches of an image into discrete tokens: the targets of masked image modelling."""

    kind: Literal["codebook"] = "codebook"
    """codebook: k-means over normalised patches, fitted on the run's own images."""
    load: str | None = None
    """A folder or model folder that holds a fitted tokenizer, or hf-hub:ORG/NAME; null: it is fitted before step 0."""
    codebook_size: int = Field(8192, ge=2)
    """Number of codes."""
    fit_images: int = Field(2000, ge=1)
    """Images that the fit reads."""
    iterations: int = Field(20, ge=1)
    """k-means iterations."""


class TokenizersConfig(Config):
    """Both tokenizers; they are fitted by rank 0, written before step 0, and travel in every checkpoint."""

    text: TextTokenizerConfig = TextTokenizerConfig()
    """The text tokenizer."""
    visual: VisualTokenizerConfig = VisualTokenizerConfig()
    """The visual tokenizer."""
