"""WordPiece: trained from texts so that the same texts always give the same file, or read from a BERT vocab.txt."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlmoe_core.errors import TokenizerError

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100
LONGEST_FEED = 10_000


def build_wordpiece(ids: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's normaliser, pre-tokeniser and `[CLS] A [SEP] B [SEP]` template around the pieces `ids`.

    Those of `SPECIALS` that the pieces hold become special tokens; `[UNK]` must be among them.
    """
    model = models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS if s in ids])
    if "[CLS]" in ids and "[SEP]" in ids:
        ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train WordPiece; ids are the specials, then pieces by how often they are used in the texts, then by spelling.

    Fewer than `vocab_size` pieces come out where the texts hold no more that occur twice. Raises TokenizerError if the
    texts hold no word or `vocab_size` leaves no room beside the specials.
    """
    if vocab_size <= len(SPECIALS):
        raise TokenizerError(f"vocab_size {vocab_size} leaves no room beside the special tokens {', '.join(SPECIALS)}")
    counts = _count_words(texts, lowercase)
    if not counts:
        raise TokenizerError("the texts hold no word to fit a tokenizer on; check the text and pair sources")
    pieces = _train_pieces(counts, vocab_size - len(SPECIALS))
    uses = _count_uses(build_wordpiece({p: i for i, p in enumerate([*SPECIALS, *pieces])}, lowercase), counts)
    ordered = sorted(pieces, key=lambda piece: (-uses[piece], piece))
    return build_wordpiece({p: i for i, p in enumerate([*SPECIALS, *ordered])}, lowercase)


def read_vocab_txt(path: Path) -> Tokenizer:
    """WordPiece from a BERT vocab.txt, one piece a line, the line number from 0 its id.

    The file does not say whether text is folded to lower case; it is where no piece has a capital letter, since every
    capitalised word would be unknown otherwise. Raises TokenizerError for a repeated piece or without [UNK].
    """
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    ids: dict[str, int] = {}
    for number, line in enumerate(lines):
        piece = line.rstrip("\r")
        if piece in ids:
            raise TokenizerError(f"{path}: line {number + 1} repeats {piece!r} of line {ids[piece] + 1}; remove one")
        ids[piece] = number
    if "[UNK]" not in ids:
        raise TokenizerError(f"{path}: no line reads [UNK], so this is not a BERT vocabulary")
    ordinary = (p for p in ids if not (p.startswith("[") and p.endswith("]")))
    return build_wordpiece(ids, lowercase=not any(p != p.lower() for p in ordinary))


def _count_words(texts: Iterable[str], lowercase: bool) -> Counter[str]:
    """How often each word occurs, after normalising and splitting; words too long for WordPiece are left out."""
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    # Spaces always end a word, so each distinct run between spaces needs to be normalised only once.
    for run, count in Counter(chain.from_iterable(map(str.split, texts))).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(run)):
            if len(word) <= LONGEST_WORD:
                counts[word] += count
    return counts


def _letters(word: str) -> list[str]:
    """The pieces that a word falls into before anything is merged."""
    return [word[0], *(f"##{letter}" for letter in word[1:])]


def _train_pieces(counts: Counter[str], room: int) -> list[str]:
    """At most `room` pieces: the letters by count as far as they fit, then merges."""
    letters: Counter[str] = Counter()
    for word, count in counts.items():
        for letter in _letters(word):
            letters[letter] += count
    kept = dict.fromkeys(sorted(letters, key=lambda letter: (-letters[letter], letter))[:room])
    words = sorted(word for word in counts if kept.keys() >= set(_letters(word)))
    # The trainer knows a letter inside a word only if the same letter may also start one: those that never do are
    # lent to it. And it breaks ties by id, numbering the letters in the random order of its hash table: naming them
    # all beforehand, as if special, fixes their ids and with them every tie.
    lent = sorted({letter.removeprefix("##") for letter in kept if len(letter) == 3} - kept.keys())
    trainer = trainers.WordPieceTrainer(
        vocab_size=room + len(lent), min_frequency=2, special_tokens=[*kept, *lent], show_progress=False
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_feed(words, counts), trainer)
    return [piece for piece in tokenizer.get_vocab(with_added_tokens=False) if piece not in lent]


def _feed(words: list[str], counts: Counter[str]) -> Iterator[str]:
    """Each word as often as it occurs, since the trainer takes texts and not counts."""
    for word in words:
        whole, rest = divmod(counts[word], LONGEST_FEED)
        for times in (*[LONGEST_FEED] * whole, rest):
            yield " ".join([word] * times)


def _count_uses(tokenizer: Tokenizer, counts: Counter[str]) -> Counter[str]:
    """How often the tokenizer uses each piece in the counted words."""
    uses: Counter[str] = Counter()
    for word, count in counts.items():
        for token in tokenizer.model.tokenize(word):
            uses[token.value] += count
    return uses
