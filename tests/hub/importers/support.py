"""Official-looking files built here, and the models that come out of them."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.support import batch_of
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.hub.importers.importing import ImportOptions, import_model
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.load import load_model_recipe

EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SAID = ["red", "green", "blue", "yellow", "circle", "square", "star", "left", "right", "above", "below", "Grün", "café"]
LENGTHS = (7, 3, 12)
"""Tokens of the texts of a batch."""


def imported(
    family: str, source: Path, out: Path, options: ImportOptions = ImportOptions()
) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of the model folder that an import writes, and its import.json."""
    import_model(family, str(source), out, options)
    return encoder_of(out), json.loads((out / "import.json").read_text())


def encoder_of(folder: Path) -> Encoder:
    """The encoder of a model folder; all its names must fit."""
    checkpoint = read_checkpoint(folder, verify="sha256")
    recipe = load_model_recipe(folder / "recipe.yaml")
    encoder = Encoder(recipe.model, recipe.tokenizers.text.vocab_size)
    encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in checkpoint.model.items()})
    return encoder.eval()


def visible(batch: Batch) -> Batch:
    """The same batch with no patch hidden."""
    return replace(batch, patch_mask_IP=torch.zeros_like(batch.patch_mask_IP))


def some(stream: StreamName, config: ModelConfig, seed: int = 0) -> Batch:
    """Three examples, nothing hidden."""
    return visible(batch_of(stream, LENGTHS, config, seed))


@torch.no_grad()
def encode(encoder: Encoder, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
    """States of the images (I, N, D), and of each text (T, D)."""
    encoded = encoder(batch)
    images: Tensor = encoded.image_states_IND
    return images, encoded.text_states_TD.split(LENGTHS) if batch.text_ids_T.numel() else ()


def normalised(batch: Batch) -> Tensor:
    """(I, 3, H, W) from -1 to 1."""
    return batch.pixels_ICHW.float() / 127.5 - 1


def spm_file(folder: Path, **options: Any) -> Path:
    """A small SentencePiece model like beit3.spm: <unk>, <s>, </s>, then pieces of a Unigram model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [
        " ".join(SAID[(i * k + k) % len(SAID)] for i in range(3 + k % 7)).capitalize() + "." for k in range(1, 160)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 60, "model_type": "unigram", **options},
    )
    path = folder / "beit3.spm"
    path.write_bytes(model.getvalue())
    return path


def vocab_file(folder: Path, size: int) -> Path:
    """A BERT vocab.txt of so many pieces."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "##s"]
    path = folder / "vocab.txt"
    path.write_text("\n".join([*words, *(f"w{n}" for n in range(size - len(words)))]) + "\n")
    return path
