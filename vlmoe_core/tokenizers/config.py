"""What a recipe says of tokenizers."""

from typing import Literal, Self

from pydantic import Field, model_validator

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

    kind: Literal["codebook", "vqkd"] = "codebook"
    """codebook: k-means over normalised patches, fitted on the run's own images. vqkd: a transformer with a learned
    codebook (BEiT v2), which a run of its own trains (recipes/tokenizer) or `vlmoe import vqkd` makes."""
    load: str | None = None
    """A tokenizer's or model folder, the run that trained it, or hf-hub:ORG/NAME; null: fitted before step 0."""
    codebook_size: int = Field(8192, ge=2)
    """Number of codes."""
    fit_images: int = Field(2000, ge=1)
    """Images that the fit reads."""
    iterations: int = Field(20, ge=1)
    """k-means iterations."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the tokenizer, whatever the model's; distances to the codes are always float32."""
    tokens: str | None = None
    """Folder with the stored codes of every position (vlmoe data tokenize); null: encoded in the step."""

    @property
    def is_fitted(self) -> bool:
        """Whether the run fits it: the recipe names neither a tokenizer nor codes, with which theirs is kept."""
        return self.load is None and self.tokens is None

    @property
    def origin(self) -> "VisualTokenizerConfig":
        """What decides which tokenizer it is; how and when images are encoded is left out."""
        return self.model_copy(update={"precision": "fp32", "tokens": None})


class TeacherConfig(Config):
    """Whose features a visual tokenizer learns to tell from its codes (BEiT v2, arXiv 2208.06366, section 2.2)."""

    model: str = "pixels"
    """pixels: those of the patch itself; else a vision model of transformers: a folder, or a name on the Hub."""
    dim: int | None = Field(None, ge=1)
    """Width of the model's features; null with pixels."""

    @model_validator(mode="after")
    def _width_is_known(self) -> Self:
        if (self.model == "pixels") != (self.dim is None):
            said = "leave out dim" if self.dim is not None else "say their width with dim (CLIP ViT-B/16: 512)"
            raise ValueError(f"teacher '{self.model}' with dim {self.dim}: {said}")
        return self

    def width(self, patch_size: int) -> int:
        """Features of a patch; the pixels have one more, a constant."""
        return 3 * patch_size**2 + 1 if self.dim is None else self.dim


class TokenizersConfig(Config):
    """Both tokenizers; they are fitted by rank 0, written before step 0, and travel in every checkpoint."""

    text: TextTokenizerConfig = TextTokenizerConfig()
    """The text tokenizer."""
    visual: VisualTokenizerConfig = VisualTokenizerConfig()
    """The visual tokenizer."""
