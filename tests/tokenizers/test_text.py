import json
import os
import pickle
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from vlmoe_core.errors import TokenizerError
from vlmoe_core.tokenizers.text import TextTokenizer, fit_wordpiece, load_text_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared"
BERT = SHARED / "data" / "bert-base-uncased"
needs_shared = pytest.mark.skipif(not BERT.is_dir(), reason="../shared is absent")

TEXTS = [
    "A red circle is left of a small blue square.",
    "Two green triangles, above a Yellow star!",
    "the café isn't open: 3 naïve circles wait",
    "a red circle and a red square and a red star",
]

# Many words of equal count: whatever breaks ties by the order of a hash table gives different pieces each time.
FIT_TIES = """
import random, sys
from vlmoe_core.tokenizers.text import fit_wordpiece
draw = random.Random(0)
words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 6))) for _ in range(300)]
sys.stdout.write(fit_wordpiece([" ".join(words), " ".join(words)], int(sys.argv[1]), True).to_json())
"""


@pytest.fixture(scope="module")
def fitted() -> TextTokenizer:
    return fit_wordpiece(TEXTS, 200, lowercase=True)


def test_special_tokens_come_first(fitted: TextTokenizer) -> None:
    assert [fitted.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (fitted.pad_id, fitted.unk_id, fitted.cls_id, fitted.sep_id, fitted.mask_id) == (0, 1, 2, 3, 4)
    assert fitted.special_ids == frozenset(range(5))
    assert fitted.word_ids == list(range(5, fitted.vocab_size))
    assert fitted.notes == ()


def test_pieces_are_numbered_by_count_then_spelling(fitted: TextTokenizer) -> None:
    counts = {i: 0 for i in fitted.word_ids}
    for text in TEXTS:
        for token in fitted.encode(text):
            counts[token] += 1
    keys = [(-counts[i], fitted.id_to_token(i)) for i in fitted.word_ids]
    assert keys == sorted(keys)
    assert fitted.id_to_token(5) == "a"


def test_fitted_text_survives_the_round_trip(fitted: TextTokenizer) -> None:
    assert fitted.decode(fitted.encode("A RED circle")) == "a red circle"
    assert fitted.decode([fitted.cls_id, *fitted.encode("a café"), fitted.sep_id]) == "a cafe"
    assert fitted.encode("") == []


def test_case_is_kept_when_asked() -> None:
    cased = fit_wordpiece(TEXTS, 200, lowercase=False)
    assert cased.encode("A red") != cased.encode("a red")
    assert cased.decode(cased.encode("A Yellow star")) == "A Yellow star"


@pytest.mark.parametrize("size", [16, 40, 100])
def test_vocab_size_is_never_exceeded(size: int) -> None:
    assert fit_wordpiece(TEXTS, size, lowercase=True).vocab_size <= size


def test_letters_without_room_become_unknown() -> None:
    tiny = fit_wordpiece(["aaa aaa aaa aaa zq"], 7, lowercase=True)
    assert tiny.token_to_id("a") == 6 or tiny.token_to_id("##a") == 6
    assert tiny.encode("zq") == [tiny.unk_id]


def test_a_word_too_long_is_left_out_of_the_fit() -> None:
    tokenizer = fit_wordpiece(["word word", "x" * 500], 64, lowercase=True)
    assert tokenizer.token_to_id("x") is None
    assert tokenizer.encode("x" * 500) == [tokenizer.unk_id]


@pytest.mark.parametrize("size", [60, 120])
def test_fit_is_the_same_in_every_process(size: int) -> None:
    def fit(seed: int) -> bytes:
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "TOKENIZERS_PARALLELISM": "true" if seed % 2 else "false"}
        run = subprocess.run([sys.executable, "-c", FIT_TIES, str(size)], env=env, capture_output=True, check=True)
        return run.stdout

    files = {fit(seed) for seed in range(4)}
    assert len(files) == 1
    assert len(json.loads(files.pop())["model"]["vocab"]) == size


def test_the_order_of_the_texts_does_not_matter(fitted: TextTokenizer) -> None:
    assert fit_wordpiece(reversed(TEXTS), 200, lowercase=True).to_json() == fitted.to_json()


@pytest.mark.parametrize("texts", [[], ["", "  \n "]])
def test_fit_without_words_is_refused(texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="hold no word"):
        fit_wordpiece(texts, 100, lowercase=True)


def test_fit_without_room_is_refused() -> None:
    with pytest.raises(TokenizerError, match="vocab_size 5 leaves no room"):
        fit_wordpiece(TEXTS, 5, lowercase=True)


def test_save_and_load(fitted: TextTokenizer, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "new" / "folder")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    for spec in (path, path.parent):
        loaded = load_text_tokenizer(str(spec))
        assert loaded.fingerprint == fitted.fingerprint
        assert loaded.to_json() == fitted.to_json()
        assert loaded.encode(TEXTS[1]) == fitted.encode(TEXTS[1])


def test_pickle_and_spawn(fitted: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(fitted))
    assert copy.fingerprint == fitted.fingerprint
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(fitted.encode, (TEXTS[2],)) == fitted.encode(TEXTS[2])


def test_fingerprint_changes_with_the_encoding(fitted: TextTokenizer) -> None:
    others = [fit_wordpiece(TEXTS, 200, False), fit_wordpiece(TEXTS, 60, True), fit_wordpiece(TEXTS[:3], 200, True)]
    assert len({fitted.fingerprint, *(o.fingerprint for o in others)}) == 4


def test_a_special_name_in_a_text_is_ordinary_text(fitted: TextTokenizer) -> None:
    assert not set(fitted.encode("a [MASK] [SEP] star")) & {fitted.mask_id, fitted.sep_id}


def test_encode_masked(fitted: TextTokenizer) -> None:
    assert fitted.encode_masked("a red [MASK] and [MASK]") == [
        *fitted.encode("a red"),
        fitted.mask_id,
        *fitted.encode("and"),
        fitted.mask_id,
    ]
    assert fitted.encode_masked("a red star") == fitted.encode("a red star")


@pytest.mark.parametrize("token_id", [-1, 10_000])
def test_an_unknown_id_is_refused(fitted: TextTokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match=f"no token has the id {token_id}"):
        fitted.id_to_token(token_id)


def test_aliases_are_used_and_missing_specials_added() -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.enable_truncation(1)
    tokenizer = TextTokenizer(inner)
    assert (tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2)
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.encode("hello there hello") == [3, 0, 3]
    assert tokenizer.notes == (
        "the tokenizer has no pad token: [PAD] is added as id 4",
        "the tokenizer's <unk> serves as [UNK]",
        "the tokenizer's <s> serves as [CLS]",
        "the tokenizer's </s> serves as [SEP]",
        "the tokenizer has no mask token: [MASK] is added as id 5",
    )
    assert inner.get_vocab_size() == 4


def test_the_models_own_unknown_token_is_used() -> None:
    tokenizer = TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "oov": 1}, unk_token="oov")))
    assert tokenizer.unk_id == 1
    assert 1 in tokenizer.special_ids


@needs_shared
def test_both_bert_files_encode_alike() -> None:
    from_json = load_text_tokenizer(str(BERT / "tokenizer.json"))
    from_txt = load_text_tokenizer(str(BERT / "vocab.txt"))
    assert from_txt.vocab_size == from_json.vocab_size == 30522
    for name in ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id"):
        assert getattr(from_txt, name) == getattr(from_json, name)
    assert (from_txt.pad_id, from_txt.unk_id, from_txt.cls_id, from_txt.sep_id, from_txt.mask_id) == (
        0,
        100,
        101,
        102,
        103,
    )
    lines = (SHARED / "data" / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8").splitlines()[:300]
    for text in [*lines, *TEXTS, "東京 is Tokyo \u2028 end", "zqxzqx" * 30]:
        assert from_txt.encode(text) == from_json.encode(text)


@needs_shared
def test_bert_ids_equal_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast.from_pretrained(str(BERT))
    ours = load_text_tokenizer(str(BERT))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_vocab_txt_with_capitals_keeps_case(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nRed\nred\n")
    tokenizer = load_text_tokenizer(str(tmp_path))
    assert tokenizer.encode("Red red RED") == [5, 6, 1]


def test_vocab_txt_with_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\r\n[UNK]\r\nred\r\n")
    assert load_text_tokenizer(str(tmp_path)).encode("RED") == [2]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[UNK]\na\nb\na\n", "line 4 repeats 'a' of line 2"), ("a\nb\n", "no line reads \\[UNK\\]")],
)
def test_a_bad_vocab_txt_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_text_tokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe\x00", b""])
def test_a_bad_tokenizer_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a|can't be read"):
        load_text_tokenizer(str(path))


@needs_shared
def test_a_folder_prefers_tokenizer_json(tmp_path: Path, fitted: TextTokenizer) -> None:
    shutil.copy(BERT / "vocab.txt", tmp_path)
    fitted.save(tmp_path)
    assert load_text_tokenizer(str(tmp_path)).fingerprint == fitted.fingerprint


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_can_be_encoded(text: str) -> None:
    tokenizer = fit_wordpiece(TEXTS, 100, lowercase=True)
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not set(ids) & (tokenizer.special_ids - {tokenizer.unk_id})
