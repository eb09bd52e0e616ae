"""Statements about two pictures: true by a second reading, every sentence true of one pair and false of another."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind, Present
from vlmoe_core.data.scenes.statements import (
    RULES,
    GroundsAlike,
    InPictures,
    OnSide,
    Pair,
    Rule,
    SidesCompare,
    Together,
    make_pair_set,
)
from vlmoe_core.data.scenes.words import NUMBERS, plural
from vlmoe_core.data.scenes.world import HELD_OUT, SHAPES, Ground, Scene, SceneObject, make_scene

SETS = [make_pair_set("train", 0, number) for number in range(400)]
SINGULAR = {plural(shape): shape for shape in (*SHAPES, "shape")}


def _count(scene: Scene, phrase: str) -> int:
    named = {SINGULAR.get(word, word) for word in phrase.split()} - {"shape"}
    things = scene.as_facts()["objects"]
    return sum(named <= {thing["shape"], thing["colour"], thing["size"]} for thing in things)


def _has(scene: Scene, words: str) -> bool:
    """`shows a red star` or `has a striped background`, of one picture."""
    ground = re.fullmatch(r"ha(?:s|ve) an? (\w+) background", words)
    if ground:
        return bool(scene.as_facts()["ground"]["texture"] == ground[1])
    return _count(scene, re.sub(r"^shows? an? ", "", words)) > 0


def _read(text: str, pair: Pair) -> bool:
    """True if the words are true of the two pictures, left and right."""
    sides = {"left": pair[0], "right": pair[1]}
    number_words = "|".join(NUMBERS)
    readings: list[tuple[str, Callable[..., Any]]] = [
        (
            r"the (left|right) picture (.+) and the (left|right) one does not",
            lambda here, what, there: here != there and _has(sides[here], what) and not _has(sides[there], what),
        ),
        (
            r"only the (left|right) picture (.+)",
            lambda here, what: _has(sides[here], what) and sum(_has(scene, what) for scene in pair) == 1,
        ),
        (r"exactly one of the pictures (.+)", lambda what: sum(_has(scene, what) for scene in pair) == 1),
        (
            r"both pictures show the same number of (.+)",
            lambda what: _count(pair[0], what) == _count(pair[1], what),
        ),
        (r"both pictures (.+)", lambda what: all(_has(scene, what) for scene in pair)),
        (r"neither picture (.+)", lambda what: not any(_has(scene, what) for scene in pair)),
        (
            r"there are (more|fewer) (.+) in the (left|right) picture than in the (?:left|right) one",
            lambda order, what, here: (
                (_count(pair[0], what) - _count(pair[1], what))
                * (1 if here == "left" else -1)
                * (1 if order == "more" else -1)
                > 0
            ),
        ),
        (
            rf"the two pictures together show ({number_words}) (.+)",
            lambda number, what: sum(_count(scene, what) for scene in pair) == NUMBERS.index(number),
        ),
        (
            r"the two pictures have (the same|different) background patterns?",
            lambda how: (pair[0].ground.texture == pair[1].ground.texture) == (how == "the same"),
        ),
        (r"the (left|right) picture (.+)", lambda here, what: _has(sides[here], what)),
    ]
    for pattern, truth in readings:
        found = re.fullmatch(pattern, text)
        if found:
            return bool(truth(*found.groups()))
    raise AssertionError(f"unread: {text}")


def test_labels_are_right_by_a_second_reading() -> None:
    for found in SETS:
        for number, pair in enumerate(found.pairs):
            for which, sentence in enumerate(found.sentences):
                assert found.label(number, which) == _read(sentence.text, pair), (sentence, pair)


def test_sentences_and_pictures_alone_tell_nothing() -> None:
    for found in SETS:
        labels = [[found.label(pair, sentence) for sentence in (0, 1)] for pair in (0, 1)]
        assert labels in ([[True, False], [False, True]], [[False, True], [True, False]])
    assert 0.4 < sum(found.label(0, 0) for found in SETS) / len(SETS) < 0.6


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=lambda rule: rule.__name__)
def test_every_rule_finds_pictures_and_speaks_the_truth(rule: Rule) -> None:
    found = 0
    for number in range(150):
        pair = make_scene("train", 1, 2 * number), make_scene("train", 1, 2 * number + 1)
        sentence = rule(pair, Dice(f"rule/{number}"))
        if sentence is not None:
            found += 1
            assert sentence.meaning.holds(pair) and _read(sentence.text, pair), sentence
    assert found >= 10


def test_sentences_are_many_and_of_many_sorts() -> None:
    texts = [sentence.text for found in SETS for sentence in found.sentences]
    assert len(set(texts)) > 0.35 * len(texts)
    starts = Counter(" ".join(text.split()[:2]) for text in texts)
    for start in ("the left", "only the", "exactly one", "both pictures", "neither picture", "there are", "the two"):
        assert starts[start] > 20, start


def test_statements_by_hand() -> None:
    star, ring = SceneObject("star", "red", "small", (200, 500)), SceneObject("ring", "blue", "large", (700, 500))
    dotted, plain = Ground("dotted", "grey", 0), Ground("plain", "grey", 0)
    pair = Scene((star, ring), dotted), Scene((ring,), plain)
    red, rings = Present((Kind(colour="red"),)), Present((Kind("ring"),))
    for true in (
        OnSide(0, red),
        OnSide(0, red, only=True),
        OnSide(1, rings),
        InPictures(1, red),
        InPictures(2, rings),
        SidesCompare(Kind(), "more"),
        SidesCompare(Kind("ring"), "equal"),
        Together(Kind(), 3),
        GroundsAlike(False),
    ):
        assert true.holds(pair), true
    for false in (
        OnSide(1, red),
        OnSide(1, rings, only=True),
        InPictures(2, red),
        InPictures(0, rings),
        SidesCompare(Kind(), "fewer"),
        SidesCompare(Kind("star"), "equal"),
        Together(Kind("ring"), 1),
        GroundsAlike(True),
    ):
        assert not false.holds(pair), false


def test_training_names_no_held_out_pair() -> None:
    pairs = re.compile("(?:" + "|".join(f"{colour} {shape}s?" for colour, shape in HELD_OUT) + r")\b")
    assert not any(pairs.search(sentence.text) for found in SETS for sentence in found.sentences)
    held_out = [make_pair_set("eval", 0, number, "heldout") for number in range(100)]
    assert any(pairs.search(sentence.text) for found in held_out for sentence in found.sentences)


def test_sets_are_pinned() -> None:
    texts = "\n".join(f"{s.text} {f.label(0, i)}" for f in SETS[:200] for i, s in enumerate(f.sentences))
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "f95525270ecc10c0a857ab571121660a25dba0fbb9bf68a4d43acbbf65bfb16c"
    )
