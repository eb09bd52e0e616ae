"""The text tokenizer: any model of the `tokenizers` package with the five special tokens that a run needs."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Tokenizer

from vlmoe_core.errors import TokenizerError
from vlmoe_core.tokenizers.locate import tokenizer_file
from vlmoe_core.tokenizers.spm import read_spm
from vlmoe_core.tokenizers.wordpiece import SPECIALS, build_wordpiece, read_vocab_txt, train_wordpiece

FILE_NAME = "tokenizer.json"

# Names of each special token, the preferred first: BERT's, then SentencePiece's.
ALIASES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>", "<bos>"),
    "sep": ("[SEP]", "<sep>", "</s>", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
}


class TextTokenizer:
    """Turns a text into token ids and back; the `TextEncoder` that data asks for.

    A special token that the wrapped tokenizer has under a known other name (`<s>` for [CLS], ...) is used as it is; one
    that it lacks is added after its last id. `notes` says so, a sentence each. Truncation and padding are switched off.
    It pickles as its JSON, so it is cheap to hand to a spawned process.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "[MASK]" written in a training text is a word like others, not the special token.
        self._tokenizer.encode_special_tokens = True
        specials, self.notes = _settle_specials(self._tokenizer)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = specials
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.special_ids: frozenset[int] = frozenset(
            [*specials, *(i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special)]
        )
        self.fingerprint: str = hashlib.sha256(_canonical(self.to_json())).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The tokenizer that `to_json` wrote; TokenizerError if the text is no tokenizer."""
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the tokenizers package raises bare Exception
            raise TokenizerError(f"this is not the JSON of a tokenizer ({error})") from error
        return cls(tokenizer)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return TextTokenizer.from_json, (self.to_json(),)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        text: str = self._tokenizer.to_str(pretty=True)
        return text

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.json` into the folder, which is made if need be; the path of the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens around them; a special token's name in the text is ordinary text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_masked(self, text: str) -> list[int]:
        """As `encode`, but each "[MASK]" in the text becomes the mask token, whatever its name in this tokenizer."""
        first, *others = text.split("[MASK]")
        ids = self.encode(first)
        for part in others:
            ids += [self.mask_id, *self.encode(part)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def id_to_token(self, token_id: int) -> str:
        """The spelling of a token; TokenizerError if there is no such id."""
        token: str | None = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise TokenizerError(f"no token has the id {token_id}; this tokenizer's ids are 0 to {self.vocab_size - 1}")
        return token

    @property
    def pieces(self) -> list[str]:
        """The spelling of every token, by id."""
        return [self.id_to_token(token_id) for token_id in range(self.vocab_size)]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its spelling; None if there is no such token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    @property
    def word_ids(self) -> list[int]:
        """The ids of all tokens that are not special, ascending."""
        return sorted(set(self._tokenizer.get_vocab(with_added_tokens=True).values()) - self.special_ids)


def fit_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> TextTokenizer:
    """Fit WordPiece (BERT, arXiv 1810.04805) on the texts. The same texts, in any order, give the same tokenizer.json.

    Ids are [PAD] [UNK] [CLS] [SEP] [MASK], then pieces by how often they are used in the texts, then by spelling. At
    most `vocab_size` ids, fewer where the texts hold too little. Raises TokenizerError if they hold no word.
    """
    return TextTokenizer(train_wordpiece(texts, vocab_size, lowercase))


def wordless_tokenizer() -> TextTokenizer:
    """The special tokens alone: for a run without texts."""
    return TextTokenizer(build_wordpiece({token: number for number, token in enumerate(SPECIALS)}, lowercase=True))


def load_text_tokenizer(spec: str) -> TextTokenizer:
    """Load a tokenizer.json, a BERT vocab.txt or a SentencePiece .spm / .model: by path, from a folder, or a Hub name.

    Raises TokenizerError, with the file named, if it is missing, can't be fetched, or is not a tokenizer.
    """
    path = tokenizer_file(spec)
    try:
        return TextTokenizer(_read(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"text tokenizer {path} can't be read ({error})") from error


def _read(path: Path) -> Tokenizer:
    if path.suffix == ".txt":
        return read_vocab_txt(path)
    if path.suffix in (".spm", ".model"):
        return read_spm(path)
    text = path.read_text(encoding="utf-8")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers package raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer.json of the tokenizers package ({error})") from error


def _settle_specials(tokenizer: Tokenizer) -> tuple[tuple[int, int, int, int, int], tuple[str, ...]]:
    """Find or add the special tokens; their ids (pad, unk, cls, sep, mask) and what is worth saying about them."""
    own_unk = getattr(tokenizer.model, "unk_token", None)
    ids: dict[str, int] = {}
    notes: list[str] = []
    for role, aliases in ALIASES.items():
        known = (own_unk, *aliases) if role == "unk" and own_unk else aliases
        found = next((name for name in known if tokenizer.token_to_id(name) is not None), None)
        name = found or aliases[0]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        ids[role] = int(tokenizer.token_to_id(name) or 0)
        if found is None:
            notes.append(f"the tokenizer has no {role} token: {name} is added as id {ids[role]}")
        elif found != aliases[0]:
            notes.append(f"the tokenizer's {found} serves as {aliases[0]}")
    return (ids["pad"], ids["unk"], ids["cls"], ids["sep"], ids["mask"]), tuple(notes)


def _canonical(text: str) -> bytes:
    return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode()
