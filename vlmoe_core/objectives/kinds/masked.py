"""Masked data modelling on images, texts and pairs (BEiT-3, arXiv 2208.10442, section 2.2; VL-MoE, arXiv 2303.07226).

Axis letters: I images, P patches, T text tokens, M hidden tokens, D width, V words, C codes.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.config import Config as BaseConfig
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.errors import TokenizerError
from vlmoe_core.model.block import Routed
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoded, Encoder
from vlmoe_core.model.paths import freeze_unused
from vlmoe_core.objectives.balance import Balance
from vlmoe_core.objectives.config import Hidden, ObjectiveConfig
from vlmoe_core.objectives.contrastive import alone, contrast
from vlmoe_core.objectives.heads import ContrastHead, MaskedHeads, pool_cls
from vlmoe_core.objectives.loss import Loss, Part, added
from vlmoe_core.tokenizers.config import TokenizersConfig
from vlmoe_core.tokenizers.online import ImageCoder


class WeightsConfig(BaseConfig):
    """How much each loss counts in the total."""

    mlm: float = Field(1.0, ge=0)
    """Hidden words of single texts."""
    mim: float = Field(1.0, ge=0)
    """Hidden patches of single images."""
    vlm_text: float = Field(1.0, ge=0)
    """Hidden words of captions."""
    vlm_image: float = Field(1.0, ge=0)
    """Hidden patches of captioned images."""
    itc: float = Field(0.0, ge=0)
    """Contrast of the pair stream's images and captions, each alone with nothing hidden; 0: none (VL-MoE). With it, a
    stream whose other weights all are 0 is not encoded: contrast alone is LIMoE's pretraining (arXiv 2206.02770)."""


class Config(ObjectiveConfig):
    """Masked data modelling."""

    name: Literal["masked"] = "masked"
    """Masked data modelling."""
    weights: WeightsConfig = WeightsConfig()
    """Weights of the losses."""

    @property
    def needs_whole_batch(self) -> bool:
        """Contrast compares all pairs of a step with each other."""
        return self.weights.itc > 0

    def num_head_params(self, model: ModelConfig, tokenizers: TokenizersConfig) -> int:
        """Words, codes, and the two maps and the temperature of contrast."""
        words, codes = tokenizers.text.vocab_size, tokenizers.visual.codebook_size
        contrast = 2 * model.dim**2 + 1 if self.weights.itc > 0 else 0
        return (model.dim + 1) * (words + codes) + contrast

    def passes(self, stream: StreamName) -> Mapping[StreamName, int]:
        """Once with what is hidden, unless no weight asks for it; contrast encodes images and texts alone as well."""
        weights = self.weights
        sums = {"image": weights.mim, "text": weights.mlm, "pair": weights.vlm_text + weights.vlm_image}
        hidden: dict[StreamName, int] = {stream: 1} if sums[stream] > 0 or weights.itc == 0 else {}
        alone: dict[StreamName, int] = {"image": 1, "text": 1} if weights.itc > 0 and stream == "pair" else {}
        return hidden | alone

    def head_flops(self, stream: StreamName, model: ModelConfig, tokenizers: TokenizersConfig, hidden: Hidden) -> int:
        """The maps of the hidden words and patches, and of the two [CLS] that are compared, the cosines left out."""
        words, codes = tokenizers.text.vocab_size, tokenizers.visual.codebook_size
        passes = self.passes(stream)
        predicted = 2 * model.dim * (hidden.words * words + hidden.patches * codes) if stream in passes else 0
        compared = 4 * model.dim**2 if self.weights.itc > 0 and stream == "pair" else 0
        return predicted + compared


WORDS: Mapping[StreamName, str] = {"text": "mlm", "pair": "vlm_text"}
PATCHES: Mapping[StreamName, str] = {"image": "mim", "pair": "vlm_image"}


class MaskedModelling(nn.Module):
    """Encoder and heads; predicts hidden words and the visual codes of hidden patches.

    Args:
        config: weights of the losses.
        encoder: the encoder; its config is the model's.
        vocab_size: V.
        codebook_size: C.
        visual: turns images into codes; frozen, not part of the state dict; null where no image ever comes, or batches
            bring their codes.
    """

    def __init__(
        self, config: Config, encoder: Encoder, vocab_size: int, codebook_size: int, visual: ImageCoder | None
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.heads = MaskedHeads(encoder.config, vocab_size, codebook_size)
        self.visual = visual
        self.balance = Balance(encoder.config)
        weights = config.weights
        sums = {"image": weights.mim, "text": weights.mlm, "pair": weights.vlm_text + weights.vlm_image}
        self.masked: tuple[StreamName, ...] = STREAMS
        """Streams that are encoded with what is hidden."""
        self.contrast = None
        if weights.itc > 0:
            self.masked = tuple(stream for stream in STREAMS if sums[stream] > 0)
            self.contrast = ContrastHead(encoder.config.dim)
            for head in (self.contrast.image, self.contrast.text):
                nn.init.trunc_normal_(head.weight, std=encoder.config.init_std)
            freeze_unused(encoder, {*self.masked, "image", "text"})
            self.heads.text.requires_grad_(bool({"text", "pair"} & set(self.masked)))
            self.heads.image.requires_grad_(bool({"image", "pair"} & set(self.masked)))

    def forward(self, batches: Mapping[StreamName, Batch]) -> Loss:
        """The losses of one micro-batch; an empty stream adds 0 and gives its parameters zero gradients.

        A stream that is absent leaves its parameters without gradient: several ranks need all three.

        Raises TokenizerError where patches are hidden and there are neither codes nor a visual tokenizer.
        """
        masked = self._masked(batches)
        parts: dict[str, Part] = {}
        routed: dict[StreamName, tuple[Routed, ...]] = {}
        for stream, batch in masked.items():
            encoded = self.encoder(batch)
            parts |= self._predictions(stream, batch, encoded)
            routed[stream] = encoded.routed
        if self.training:
            parts |= self.balance.parts(masked, routed)
        told = tuple((stream, one) for stream, plans in routed.items() for one in plans)
        if self.contrast is None or "pair" not in batches:
            return Loss(parts, told)
        contrasted = self._contrasted(self.contrast, batches["pair"])
        return Loss(added(parts, contrasted.parts), told + contrasted.routed)

    def counts(self, batches: Mapping[StreamName, Batch]) -> dict[str, int]:
        """The count of every part, from the masks alone: no forward pass."""
        masked = self._masked(batches)
        counts = {name: masked[s].num_masked_words for s, name in WORDS.items() if s in masked}
        counts |= {name: masked[s].num_masked_patches for s, name in PATCHES.items() if s in masked}
        counts |= self.balance.counts(masked)
        if self.contrast is not None and "pair" in batches:
            counts["itc"] = batches["pair"].num_examples
            for name, count in self.balance.counts(alone(batches["pair"])).items():
                counts[name] = counts.get(name, 0) + count
        return counts

    def _masked(self, batches: Mapping[StreamName, Batch]) -> dict[StreamName, Batch]:
        return {stream: batch for stream, batch in batches.items() if stream in self.masked}

    def _contrasted(self, head: ContrastHead, pairs: Batch) -> Loss:
        """Image-text contrast, and the balance of the layers that images and captions passed alone."""
        batches = alone(pairs)
        encoded = {stream: self.encoder(batch) for stream, batch in batches.items()}
        image_XD, text_XD = head(pool_cls(encoded["image"]), pool_cls(encoded["text"]))
        total = contrast(image_XD, text_XD, pairs.image_ids, head.scale, over_ranks=self.training)
        parts = {"itc": Part(total, pairs.num_examples, self.config.weights.itc, ("pair",))}
        routed = {stream: one.routed for stream, one in encoded.items()}
        if self.training:
            parts |= self.balance.parts(batches, routed)
        return Loss(parts, tuple((stream, one) for stream, plans in routed.items() for one in plans))

    @property
    def target_sizes(self) -> dict[str, int]:
        """How many words or codes each of the four parts chooses from."""
        words = dict.fromkeys(WORDS.values(), self.heads.text.out_features)
        return words | dict.fromkeys(PATCHES.values(), self.heads.image.out_features)

    @torch.no_grad()
    def targets(self, batches: Mapping[StreamName, Batch]) -> dict[str, Tensor]:
        """(M,) what must be predicted, for each of the four parts."""
        words = {name: _word_targets(batches[s])[1] for s, name in WORDS.items() if s in batches}
        patches = {name: self._codes(batches[s])[1] for s, name in PATCHES.items() if s in batches}
        return words | patches

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of every text token (T, V) and of every patch (I, P, C)."""
        encoded = self.encoder(batch)
        return self.heads.text(encoded.text_states_TD), self.heads.image(encoded.image_states_IND[:, 1:])

    def _predictions(self, stream: StreamName, batch: Batch, encoded: Encoded) -> dict[str, Part]:
        parts = {}
        if stream in WORDS:
            places, targets = _word_targets(batch)
            logits_MV = self.heads.text(encoded.text_states_TD.index_select(0, places))
            parts[WORDS[stream]] = self._part(WORDS[stream], stream, logits_MV, targets)
        if stream in PATCHES:
            places, targets = self._codes(batch)
            patches = encoded.image_states_IND[:, 1:].flatten(0, 1)
            logits_MC = self.heads.image(patches.index_select(0, places))
            parts[PATCHES[stream]] = self._part(PATCHES[stream], stream, logits_MC, targets)
        return parts

    def _part(self, name: str, stream: StreamName, logits: Tensor, targets: Tensor) -> Part:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(logits, targets, reduction="sum")
        return Part(total, targets.shape[0], getattr(self.config.weights, name), (stream,))

    def _codes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(places among all patches, codes) of the hidden patches."""
        places = torch.nonzero_static(batch.patch_mask_IP.flatten(), size=batch.num_masked_patches)[:, 0]
        if batch.num_masked_patches == 0:
            return places, places
        return places, self._all_codes(batch).flatten().index_select(0, places)

    def _all_codes(self, batch: Batch) -> Tensor:
        """(I, P), stored or made now."""
        if batch.codes_IP is not None:
            return batch.codes_IP
        if self.visual is None:
            raise TokenizerError("hidden patches can't be predicted without a visual tokenizer; load or fit one")
        return self.visual.encode(batch.pixels_ICHW)


def _word_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """(places among all text tokens, ids) of the hidden words."""
    places = torch.nonzero_static(batch.text_targets_T >= 0, size=batch.num_masked_words)[:, 0]
    return places, batch.text_targets_T.index_select(0, places)


build = MaskedModelling
