"""The classes of words: all that captions of scenes say is in one, and so is the grammar of any English text."""

import re
from collections.abc import Iterator

import pytest

from vlmoe_core.analysis.routing.words import CLASSES, DRAWN, ENGLISH, word_class
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.language import FAMILIES, make_caption
from vlmoe_core.data.scenes.questions import QUESTION_TYPES, make_question
from vlmoe_core.data.scenes.words import COMMON, PLACE_WORDS, RELATION_WORDS, SHAPE_WORDS, SIZE_WORDS, plural
from vlmoe_core.data.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, make_scene


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def templates() -> Iterator[str]:
    """The fixed words of all captions and questions."""
    for family in FAMILIES:
        yield from family.templates
    for question in QUESTION_TYPES:
        yield from question.templates


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        ("the", "determiner"),
        ("The", "determiner"),
        ("of", "preposition"),
        ("they", "pronoun"),
        ("and", "conjunction"),
        ("is", "auxiliary"),
        ("not", "negation"),
        ("no", "negation"),
        ("where", "question"),
        ("every", "quantifier"),
        ("than", "comparison"),
        ("grey", "colour"),
        ("scarlet", "colour"),
        ("discs", "shape"),
        ("rhombuses", "shape"),
        ("tiny", "size"),
        ("bigger", "size"),
        ("mottled", "texture"),
        ("darker", "tone"),
        ("left", "relation"),
        ("seven", "number"),
        ("42", "number"),
        ("½", "number"),
        ("shows", "verb"),
        ("somewhere", "adverb"),
        ("background", "picture"),
        (",", "punctuation"),
        ("...", "punctuation"),
        ("#", "punctuation"),
        ("##", "punctuation"),
        ("##ing", "continuation"),
        ("##s", "continuation"),
        ("[UNK]", "special"),
        ("[", "punctuation"),
        ("dog", "open"),
        ("42nd", "open"),
        ("▁the", "determiner"),
        ("Ġdog", "open"),
        ("▁", "punctuation"),
    ],
)
def test_class_of(piece: str, name: str) -> None:
    assert word_class(piece) == name


def test_no_word_is_in_two_classes() -> None:
    listed = [word for words in DRAWN.values() for word in words]
    listed += [word for words in ENGLISH.values() for word in words.split()]
    assert sorted(listed) == sorted(CLASSES)


def test_listed_words_are_words_in_small_letters() -> None:
    assert not [word for word in CLASSES if word != word.lower() or not word.isalpha()]


@pytest.mark.parametrize(
    ("names", "name"), [(COLOURS, "colour"), (SHAPES, "shape"), (SIZES, "size"), (TEXTURES, "texture")]
)
def test_the_world_of_scenes_has_a_class_each(names: tuple[str, ...], name: str) -> None:
    assert {word_class(word) for word in names} == {name}


def test_synonyms_and_plurals_are_of_the_same_class() -> None:
    shapes = [word for words in SHAPE_WORDS.values() for word in words]
    assert {word_class(word) for word in [*shapes, *map(plural, shapes)]} == {"shape"}
    assert {word_class(word) for words in SIZE_WORDS.values() for word in words} == {"size"}


def test_every_word_of_the_grammar_has_a_class() -> None:
    phrases = [
        phrase for table in (COMMON, RELATION_WORDS, PLACE_WORDS) for words in table.values() for phrase in words
    ]
    fixed = [re.sub(r"\{\w+\}", " ", template) for template in templates()]
    assert not {word for text in [*phrases, *fixed] for word in words_of(text) if word_class(word) == "open"}


def test_every_word_of_captions_and_questions_has_a_class() -> None:
    said = set()
    for number in range(300):
        scene, dice = make_scene("train", 0, number, "all"), Dice(f"classes/{number}")
        said |= {*words_of(make_caption(scene, dice).text), *words_of(make_question(scene, dice).text)}
    assert len(said) > 120
    assert not {word for word in said if word_class(word) == "open"}
