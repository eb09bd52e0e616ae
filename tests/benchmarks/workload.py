"""Inputs of the model benchmarks: random pictures and words of real lengths, masked and collated as in training.

Axis letters: D values of a patch, F features, K codes.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.model.config import ModelConfig, SparseConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.objectives.config import MaskConfig
from vlmoe_core.objectives.kinds.masked import Config, MaskedModelling
from vlmoe_core.objectives.masking import Masking
from vlmoe_core.tokenizers.codebook import Codebook
from vlmoe_core.tokenizers.text import load_text_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WORDS, CODES, FEATURES = 30522, 8192, 32
"""Sizes of BERT's and BEiT's vocabularies, and features of a patch in our codebook."""
POSITION_STD = 0.2
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103
"""Special tokens of BERT's vocabulary."""

CAPTIONS_OF_LENGTH = {
    6: 168, 7: 380, 8: 908, 9: 1959, 10: 2623, 11: 3055, 12: 3511, 13: 3598, 14: 3566, 15: 3325, 16: 2813, 17: 2354,
    18: 1807, 19: 1381, 20: 976, 21: 770, 22: 542, 23: 364, 24: 281, 25: 199, 26: 118, 27: 90, 28: 72, 29: 44, 30: 96,
}  # fmt: skip
"""Flickr8k's captions by tokens, [CLS] and [SEP] included, the rare lengths below 6 and above 30 added to these."""


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs of a text tokenizer, without the words."""

    vocab_size: int = WORDS
    pad_id: int = PAD
    unk_id: int = UNK
    cls_id: int = CLS
    sep_id: int = SEP
    mask_id: int = MASK
    fingerprint: str = "benchmark"

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("the benchmark draws its words as ids")


def caption_lengths(count: int) -> list[int]:
    """Tokens of `count` captions of Flickr8k drawn at random, from the file if it is there."""
    captions, vocabulary = SHARED / "flickr8k" / "captions.jsonl", SHARED / "bert-base-uncased" / "vocab.txt"
    rng = random.Random(0)
    if not (captions.exists() and vocabulary.exists()):
        return rng.choices(list(CAPTIONS_OF_LENGTH), weights=list(CAPTIONS_OF_LENGTH.values()), k=count)
    rows = captions.read_text(encoding="utf-8").splitlines()
    tokenizer = load_text_tokenizer(str(vocabulary))
    return [len(tokenizer.encode(rng.choice(json.loads(row)["captions"]))) + 2 for row in rng.sample(rows, count)]


def three_streams(config: ModelConfig, count: int, first: int = 0) -> dict[StreamName, Batch]:
    """`count` examples of each stream from number `first` on; texts of 96 to 128 tokens, as packed ones are."""
    texts = [96 + 32 * i // max(1, count - 1) for i in range(count)]
    return {
        "image": make_batch("image", config, count, first=first),
        "text": make_batch("text", config, count, texts, first=first),
        "pair": make_batch("pair", config, count, caption_lengths(count), first=first),
    }


def make_batch(
    stream: StreamName,
    config: ModelConfig,
    count: int,
    lengths: Sequence[int] = (),
    pad_text_to: int = 0,
    first: int = 0,
) -> Batch:
    """`count` examples of a stream from number `first` on; texts of these lengths; `pad_text_to` as in a recipe."""
    rng = random.Random(first)
    masking = Masking.of(MaskConfig(), config.grid, Vocabulary())
    texts = [_text(stream, length, pad_text_to, masking, rng) for length in lengths] or [(None, None)] * count
    samples = []
    for position, (ids, targets) in enumerate(texts, start=first):
        pixels = mask = None
        if stream != "text":
            shape = (3, config.image_size, config.image_size)
            pixels = np.random.default_rng(position).integers(0, 256, shape, dtype=np.uint8)
            mask = masking.image(stream, rng)
        samples.append(Sample(f"example {position}", position, position, pixels, mask, ids, targets))
    return collate(stream, samples, config.image_size, config.num_patches)


def _text(
    stream: StreamName, length: int, pad_text_to: int, masking: Masking, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    words = [rng.randrange(MASK + 1, WORDS) for _ in range(length - 2)]
    ids, targets = masking.text([CLS, *words, SEP], stream, rng)
    missing = max(0, pad_text_to - length)
    return np.array(ids + [PAD] * missing), np.array(targets + [-1] * missing)


def make_model(preset: str, experts: int | None, **sizes: int) -> ModelConfig:
    """A preset with E experts in every second block of both modalities, or (None) dense.

    Dropless: a dropped token costs no arithmetic and would flatter the sparse model.
    """
    moe = SparseConfig() if experts is None else SparseConfig(vision=_moe(experts), text=_moe(experts))
    return ModelConfig.model_validate({"preset": preset, "moe": moe, **sizes})


def _moe(experts: int) -> MoEConfig:
    return MoEConfig(num_experts=experts, layers={"every": 2}, capacity_factor=None)


def make_objective(config: ModelConfig) -> MaskedModelling:
    """Masked modelling with a codebook of random codes, and tokens that differ from each other from the start.

    A fresh model sends all hidden tokens, which are nearly equal, to the same expert; a trained one does not.
    """
    torch.manual_seed(0)
    encoder = Encoder(config, WORDS)
    for position in (encoder.embeddings.image.position, encoder.embeddings.text.position):
        nn.init.normal_(position, std=POSITION_STD)
    values_D = 3 * config.patch_size**2
    basis_DF = torch.linalg.qr(torch.randn(values_D, FEATURES))[0]
    codes_KF = torch.randn(CODES, FEATURES)
    visual = Codebook(config.patch_size, torch.full((values_D,), 0.5), basis_DF, codes_KF, torch.ones(CODES))
    return MaskedModelling(Config(), encoder, WORDS, CODES, visual)


def num_tokens(batches: Mapping[StreamName, Batch], config: ModelConfig) -> int:
    """Tokens of all streams, images' [CLS] included."""
    return sum(b.num_images * (1 + config.num_patches) + b.text_ids_T.shape[0] for b in batches.values())


def gradients(objective: MaskedModelling, batches: Mapping[StreamName, Batch]) -> None:
    """Forward and backward of one micro-batch, from no gradient."""
    objective.zero_grad(set_to_none=True)
    objective(batches).total(objective.counts(batches)).backward()
