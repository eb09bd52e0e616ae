"""Parity with the sentencepiece package, on models that it trains here."""

import io
import re
from pathlib import Path
from typing import Any

import pytest

from vlmoe_core.errors import TokenizerError
from vlmoe_core.tokenizers.spm import read_spm
from vlmoe_core.tokenizers.text import TextTokenizer, load_text_tokenizer

WORDS = [
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "triangle",
    "star",
    "left",
    "right",
    "above",
    "below",
    "café",
    "Straße",
]
TEXTS = [" ".join(WORDS[(i * k + k) % len(WORDS)] for i in range(3 + k % 7)).capitalize() + "." for k in range(1, 120)]
PROBES = [
    *TEXTS[:20],
    "",
    " ",
    "  two  spaces ",
    "tab\tand\nline",
    "\uff26\uff35\uff2c\uff2c width \ufb01 ligature",
    "unknown 漢字 字 here ☃",
    "reddish greenstar circlesquare",
    "▁ literal ▁red",
    "\u200bzero width\u00a0space",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe"},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 400},
    "bpe-llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 400,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "unigram-no-prefix": {"model_type": "unigram", "add_dummy_prefix": False},
    "unigram-t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
}


def train(**options: Any) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    options = {"vocab_size": 120, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **options)
    return model.getvalue()


@pytest.mark.parametrize("name", list(VARIANTS))
def test_ids_equal_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    data = train(**VARIANTS[name])
    path = tmp_path / "model.spm"
    path.write_bytes(data)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = load_text_tokenizer(str(path))
    for text in PROBES:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)).replace("<unk>", "") == re.sub(
            " ⁇ ", "", theirs.decode(theirs.encode(text))
        )
    assert ours.unk_id == theirs.unk_id()
    assert ours.sep_id == theirs.eos_id()


def test_specials_of_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="unigram"))
    tokenizer = load_text_tokenizer(str(tmp_path))
    assert (tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2)
    assert tokenizer.id_to_token(tokenizer.mask_id) == "[MASK]"
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert "the tokenizer's <s> serves as [CLS]" in tokenizer.notes
    assert f"the tokenizer has no mask token: [MASK] is added as id {tokenizer.mask_id}" in tokenizer.notes
    saved = tokenizer.save(tmp_path / "saved")
    again = load_text_tokenizer(str(saved))
    assert again.fingerprint == tokenizer.fingerprint
    assert [again.encode(t) for t in PROBES] == [tokenizer.encode(t) for t in PROBES]


def test_pieces_that_the_user_defined(tmp_path: Path) -> None:
    path = tmp_path / "user.model"
    path.write_bytes(train(model_type="unigram", user_defined_symbols=["<image>"]))
    tokenizer = TextTokenizer(read_spm(path))
    image = tokenizer.token_to_id("<image>")
    assert image in tokenizer.encode("red<image>star")
    assert image not in tokenizer.special_ids


@pytest.mark.parametrize("model_type", ["char", "word"])
def test_other_model_types_are_refused(tmp_path: Path, model_type: str) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(train(model_type=model_type, vocab_size=40 if model_type == "char" else 20))
    with pytest.raises(TokenizerError, match=r"other\.model is neither Unigram nor BPE"):
        read_spm(path)


@pytest.mark.parametrize(
    "data", [b"", b"hello world", b"\x0a", b"\x0a\x7f", b"\x08\x01", b"\xff" * 40, b"\x0a\x02\x08\x01", bytes(64)]
)
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.spm"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=r"bad\.spm is not a SentencePiece model"):
        load_text_tokenizer(str(path))


def test_a_model_cut_short_is_refused(tmp_path: Path) -> None:
    data = train(model_type="bpe")
    path = tmp_path / "cut.model"
    for size in [*range(0, 400, 37), *range(400, len(data) - 40, len(data) // 9)]:
        path.write_bytes(data[:size])
        with pytest.raises(TokenizerError, match=r"cut\.model is not a SentencePiece model"):
            read_spm(path)
