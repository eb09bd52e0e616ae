"""The config of an exported model, as transformers reads it."""

from typing import Any

from transformers import PreTrainedConfig


class VLMoEConfig(PreTrainedConfig):
    """Encoder, vocabularies, and what stands on the encoder.

    Args:
        encoder: the fields of `ModelConfig`, all of them.
        vocab_size: rows of the word embedding.
        codebook_size: visual codes of masked modelling; 0 in a task.
        task: masked, vqa, nlvr2, retrieval, classification or nli; null: the encoder alone.
        pool: which final states the head reads.
        num_images: pictures of an example.
        matches: whether a head tells if image and text belong together.
        contrasts: whether there are heads that compare images and texts encoded alone.
        tied: parameters that are the same tensor as another: name -> the other's name.
        **kwargs: what every config of transformers has; `id2label` are the labels of the head.
    """

    model_type = "vlmoe"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        vocab_size: int = 0,
        codebook_size: int = 0,
        task: str | None = None,
        pool: Any = None,
        num_images: int = 1,
        matches: bool = False,
        contrasts: bool = False,
        tied: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder = encoder or {}
        self.vocab_size, self.codebook_size = vocab_size, codebook_size
        self.task, self.pool, self.num_images = task, pool, num_images
        self.matches, self.contrasts = matches, contrasts
        self.tied = tied or {}
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the token states."""
        return int(self.encoder.get("dim", 0))
