import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.files_support import WordEncoder
from vlmoe_core.data.packing import pack, sentences

ALPHABET = st.sampled_from(
    ["a", "Bc", "word", "Mr.", "end.", "what?", '"Go!"', "x" * 57, "。", "\n", "\n\n", "  ", "\u00e9."]
)
DOCUMENTS = st.lists(ALPHABET, max_size=60).map(" ".join)


def count(text: str) -> int:
    return len(WordEncoder().encode(text))


def split(text):
    return [text[a:b] for a, b in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Mr. Smith met J. R. Jones. They left.", ["Mr. Smith met J. R. Jones.", "They left."]),
        ("It cost 3.50 dollars, e.g. a lot.", ["It cost 3.50 dollars, e.g. a lot."]),
        ('"Who?" he asked. "Me!" She ran.', ['"Who?" he asked.', '"Me!"', "She ran."]),
        ("No stop\n\nA new paragraph", ["No stop", "A new paragraph"]),
        ("日本語。次の文。", ["日本語。", "次の文。"]),
        ("It ended ... and went on . Then", ["It ended ... and went on .", "Then"]),
        ("  \n ", []),
    ],
)
def test_sentences(text, expected):
    assert split(text) == expected


def test_whole_sentences_are_packed_greedily():
    text = "A b c. D e. F g h i. J."
    assert [text[a:b] for a, b in pack(text, 5, count)] == ["A b c. D e.", "F g h i. J."]


def test_a_long_sentence_is_cut_between_words():
    text = "One two three four five six seven. Eight."
    assert [text[a:b] for a, b in pack(text, 3, count)] == ["One two three", "four five six", "seven. Eight."]


def test_a_long_word_is_cut_between_characters():
    packs = [a + b for a, b in [("", ("x" * 57)[s:e]) for s, e in pack("x" * 57, 2, count)]]
    assert "".join(packs) == "x" * 57 and max(map(count, packs)) <= 2


@given(DOCUMENTS, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_and_no_pack_is_too_long(text, limit):
    spans = pack(text, limit, count)
    assert all(count(text[a:b]) <= limit for a, b in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())


@given(DOCUMENTS, st.integers(6, 30))
@settings(max_examples=100, deadline=None)
def test_packs_are_greedy(text, limit):
    """Where no sentence is too long, the next sentence never has room in the pack before it."""
    whole = sentences(text)
    if all(count(text[a:b]) <= limit for a, b in whole):
        spans = pack(text, limit, count)
        for (start, _), (after, _) in itertools.pairwise(spans):
            following = next(end for begin, end in whole if begin == after)
            assert count(text[start:following]) > limit


def test_a_joined_text_with_more_tokens_than_its_pieces_is_shortened():
    def growing(text: str) -> int:
        return len(text.split()) + text.count(". ")

    text = "A b. C d. E f. G h."
    assert all(growing(text[a:b]) <= 4 for a, b in pack(text, 4, growing))
