"""Statements about two pictures: true by a second reading, every sentence true of one pair and false of another."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind, Present
from vlmoe_core.data.scenes.ground import ground_pixels
from vlmoe_core.data.scenes.pair_statements import (
    DarkerGround,
    GroundsAlike,
    InPictures,
    LargestShape,
    OnSide,
    Pair,
    SidesCompare,
    Together,
)
from vlmoe_core.data.scenes.statements import STATEMENT_TYPES, StatementType, make_pair_set
from vlmoe_core.data.scenes.words import NUMBERS, plural
from vlmoe_core.data.scenes.world import HELD_OUT, SHAPES, TEXTURES, TONES, Ground, Scene, SceneObject, make_scene

SETS = [make_pair_set("train", 0, number) for number in range(400)]
SINGULAR = {plural(shape): shape for shape in (*SHAPES, "shape")}


def _count(scene: Scene, phrase: str) -> int:
    named = {SINGULAR.get(word, word) for word in phrase.split()} - {"shape"}
    things = scene.as_facts()["objects"]
    return sum(named <= {thing["shape"], thing["colour"], thing["size"]} for thing in things)


def _has(scene: Scene, words: str) -> bool:
    """`shows a red star` or `has a striped background`, of one picture."""
    ground = re.fullmatch(r"ha(?:s|ve) an? (\w+) background", words)
    if ground and ground[1] in ("dark", "light"):
        return _dark(scene) == (ground[1] == "dark")
    if ground:
        return bool(scene.as_facts()["ground"]["texture"] == ground[1])
    return _count(scene, re.sub(r"^shows? an? ", "", words)) > 0


def _dark(scene: Scene) -> bool:
    return scene.as_facts()["ground"]["tone"] in ("slate", "moss")


def _sizes(scene: Scene) -> int:
    """The largest size: 0 small, 1 medium, 2 large."""
    return max(("small", "medium", "large").index(thing["size"]) for thing in scene.as_facts()["objects"])


def _read(text: str, pair: Pair) -> bool:
    """True if the words are true of the two pictures, left and right."""
    sides = {"left": pair[0], "right": pair[1]}

    def _other(side: str) -> Scene:
        return sides["right" if side == "left" else "left"]

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
        (
            r"the background of the (left|right) picture is (darker|lighter) than that of the (?:left|right) one",
            lambda here, word: (
                (_dark(sides[here]), _dark(_other(here))) == ((True, False) if word == "darker" else (False, True))
            ),
        ),
        (r"the largest shape is in the (left|right) picture", lambda here: _sizes(sides[here]) > _sizes(_other(here))),
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


@pytest.mark.parametrize("sort", STATEMENT_TYPES, ids=lambda sort: sort.name)
def test_every_type_finds_pictures_and_speaks_the_truth(sort: StatementType) -> None:
    found = 0
    for number in range(150):
        pair = make_scene("train", 1, 2 * number), make_scene("train", 1, 2 * number + 1)
        said = sort.rule(pair, Dice(f"rule/{number}"))
        if said is not None:
            found += 1
            text, meaning = said
            assert meaning.holds(pair) and _read(text, pair), text
    assert found >= 10


def test_sentences_are_many_and_of_many_sorts() -> None:
    """Of what whole pictures show little can be said: the other types are many."""
    sets = [*SETS, *(make_pair_set("train", 0, number) for number in range(400, 1000))]
    said = [sentence for found in sets for sentence in found.sentences]
    whole = {"darker", "total", "largest"}
    texts = [sentence.text for sentence in said[:800] if sentence.statement_type not in whole]
    assert len(set(texts)) > 0.35 * len(texts)
    starts = Counter(" ".join(sentence.text.split()[:2]) for sentence in said)
    starts_wanted = "the left", "only the", "exactly one", "both pictures", "neither picture", "there are", "the two"
    for start in (*starts_wanted, "the background", "the largest"):
        assert starts[start] > 20, start


def test_grounds_that_are_called_darker_are_drawn_darker() -> None:
    for texture, left, right in product(TEXTURES, TONES, TONES):
        pair = Scene((), Ground(texture, left, 1)), Scene((), Ground(texture, right, 2))
        dark, light = (ground_pixels(scene.ground, 32).mean() for scene in pair)
        assert not DarkerGround(0).holds(pair) or dark < light - 5
        assert DarkerGround(0).holds(pair) == DarkerGround(1).holds(pair[::-1])


def test_statements_by_hand() -> None:
    star, ring = SceneObject("star", "red", "small", (200, 500)), SceneObject("ring", "blue", "large", (700, 500))
    dotted, plain = Ground("dotted", "grey", 0), Ground("plain", "slate", 0)
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
        DarkerGround(1),
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
        DarkerGround(0),
        LargestShape(0),
        LargestShape(1),
    ):
        assert not false.holds(pair), false
    assert LargestShape(1).holds((Scene((star,), plain), Scene((star, ring), plain)))
    assert not DarkerGround(0).holds((Scene((star,), Ground("plain", "sage", 0)), Scene((star,), dotted)))


def test_training_names_no_held_out_pair() -> None:
    pairs = re.compile("(?:" + "|".join(f"{colour} {shape}s?" for colour, shape in HELD_OUT) + r")\b")
    assert not any(pairs.search(sentence.text) for found in SETS for sentence in found.sentences)
    held_out = [make_pair_set("eval", 0, number, "heldout") for number in range(100)]
    assert any(pairs.search(sentence.text) for found in held_out for sentence in found.sentences)


def test_sets_are_pinned() -> None:
    texts = "\n".join(f"{s.text} {f.label(0, i)}" for f in SETS[:200] for i, s in enumerate(f.sentences))
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "369351c8569323506e3b929c2fbfce89a688b2cb391ffdd47579687eae08fed7"
    )
