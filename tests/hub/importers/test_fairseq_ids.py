"""BEiT-3's ids: those of the sentencepiece package shifted as fairseq has them, and XLM-RoBERTa's tokenizer's."""

from pathlib import Path

import pytest

from tests.hub.importers.support import spm_file
from vlmoe_core.errors import TokenizerError
from vlmoe_core.hub.importers.fairseq_ids import read_fairseq_spm
from vlmoe_core.tokenizers.text import TextTokenizer

PROBES = [
    "Red circle left of a green star.",
    "Grün café above",
    "unknown 漢字 here",
    "  two  spaces ",
    "",
    "starcircle",
]


def test_ids_are_those_of_sentencepiece_and_one(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = spm_file(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = TextTokenizer(read_fairseq_spm(path))
    for text in PROBES:
        assert ours.encode(text) == [i + 1 if i else 3 for i in theirs.encode(text)], text
    assert any(theirs.encode(text).count(0) for text in PROBES)
    assert (ours.cls_id, ours.pad_id, ours.sep_id, ours.unk_id) == (0, 1, 2, 3)
    assert ours.mask_id == theirs.get_piece_size() + 1 == ours.vocab_size - 1


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import XLMRobertaTokenizer

    path = spm_file(tmp_path)
    theirs = XLMRobertaTokenizer.from_pretrained(str(_as_their_folder(path, tmp_path)))
    ours = TextTokenizer(read_fairseq_spm(path))
    for text in PROBES:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert [ours.cls_id, *ours.encode(text), ours.sep_id] == theirs.encode(text)
    assert (ours.pad_id, ours.unk_id, ours.mask_id) == (theirs.pad_token_id, theirs.unk_token_id, theirs.mask_token_id)


def _as_their_folder(path: Path, folder: Path) -> Path:
    theirs = folder / "xlmr"
    theirs.mkdir()
    (theirs / "sentencepiece.bpe.model").write_bytes(path.read_bytes())
    (theirs / "config.json").write_text('{"model_type": "xlm-roberta"}')
    return theirs


def test_it_travels_as_a_tokenizer_json(tmp_path: Path) -> None:
    ours = TextTokenizer(read_fairseq_spm(spm_file(tmp_path)))
    again = TextTokenizer.from_json(ours.save(tmp_path / "text").read_text())
    assert again.fingerprint == ours.fingerprint
    assert [again.encode(text) for text in PROBES] == [ours.encode(text) for text in PROBES]
    assert again.mask_id == ours.mask_id and not any("added" in note for note in again.notes)


@pytest.mark.parametrize("options", [{"model_type": "bpe"}, {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}])
def test_another_kind_of_model_is_refused(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"its first pieces are <unk>, <s>, </s>; BEiT-3's is beit3\.spm"):
        read_fairseq_spm(spm_file(tmp_path, **options))
