"""From BERT come the word embeddings and the tokenizer, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub.importers.support import encoder_of, imported, vocab_file
from vlmoe_core.errors import CheckpointError
from vlmoe_core.hub.importers.importing import import_model
from vlmoe_core.model.config import PRESETS
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tokenizers.text import load_text_tokenizer


def bert_folder(folder: Path, width: int = 128, masked: bool = False) -> Path:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    config = BertConfig(hidden_size=width, vocab_size=50, **sizes)
    theirs: Any = BertForMaskedLM(config) if masked else BertModel(config)
    theirs.save_pretrained(folder)
    vocab_file(folder, 50)
    return folder


@pytest.mark.parametrize("masked", [True, False])
def test_words_and_tokenizer_come_and_nothing_else(masked: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = bert_folder(tmp_path / "bert", masked=masked)
    encoder, receipt = imported("bert", folder, tmp_path / "out")
    key = ("bert." if masked else "") + "embeddings.word_embeddings.weight"
    assert torch.equal(encoder.embeddings.text.word.weight, load_file(folder / "model.safetensors")[key])
    used = {key for key, said in receipt["keys"].items() if not said.startswith("unused")}
    filled = {name for name, said in receipt["tensors"].items() if not said.startswith("new")}
    assert used == {key} and filled == {"encoder.embeddings.text.word.weight"}
    reasons = set(receipt["keys"].values()) - {"encoder.embeddings.text.word.weight"}
    assert reasons == {"unused: from BERT come the word embeddings alone"}
    # Everything else is a fresh encoder of the preset of that width.
    assert encoder.config.model_dump() == preset_values("tiny")
    text = load_text_tokenizer(str(tmp_path / "out" / "tokenizers" / "text"))
    assert text.encode("red circles") == [5, 6, 7] and (text.cls_id, text.mask_id) == (2, 4)


def preset_values(preset: str) -> dict[str, Any]:
    from vlmoe_core.model.config import ModelConfig

    return ModelConfig.model_validate({"preset": preset}).model_dump()


def test_the_rest_is_initialised_alike_each_time(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    for name in ("one", "two"):
        torch.rand(3)
        before = torch.get_rng_state()
        import_model("bert", str(folder), tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before), "numbers that others draw stay as they are"
    first, second = (encoder_of(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["blocks.0.ffn.text.up.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert isinstance(encoder_of(tmp_path / "one"), Encoder)


def test_a_width_of_no_preset_is_refused(tmp_path: Path) -> None:
    assert 256 not in {sizes["dim"] for sizes in PRESETS.values()}
    with pytest.raises(CheckpointError, match="the word embeddings are 256 wide, and no preset of the encoder is"):
        import_model("bert", str(bert_folder(tmp_path / "bert", 256)), tmp_path / "out")
