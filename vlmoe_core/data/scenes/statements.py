"""Statements about two pictures that are true of one pair and false of another, after the manner of NLVR2.

A set is two pairs of pictures and two sentences. Each sentence is true of one of the pairs and false of the other, and
each pair has one true and one false sentence: neither sentences nor pictures alone tell which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind, OnGround, Present
from vlmoe_core.data.scenes.questions import some_kind
from vlmoe_core.data.scenes.words import NUMBERS, plain_phrase, with_article
from vlmoe_core.data.scenes.world import (
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    TEXTURES,
    Combinations,
    Scene,
    Split,
    Statement,
    make_scene,
)

Pair = tuple[Scene, Scene]
"""The left and the right picture."""
SIDES = ("left", "right")


class PairStatement(Protocol):
    """Something that is true or false of two pictures."""

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        ...


@dataclass(frozen=True)
class OnSide:
    """The part holds in the left (0) or the right (1) picture; `only`: and not in the other."""

    side: int
    part: Statement
    only: bool = False

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return self.part.holds(pair[self.side]) and not (self.only and self.part.holds(pair[1 - self.side]))


@dataclass(frozen=True)
class InPictures:
    """The part holds in exactly so many of the two pictures."""

    number: int
    part: Statement

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return sum(self.part.holds(scene) for scene in pair) == self.number


@dataclass(frozen=True)
class SidesCompare:
    """The left picture has more, fewer or as many objects of the kind than the right one."""

    kind: Kind
    order: Literal["more", "fewer", "equal"]

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        left, right = (self.kind.count(scene) for scene in pair)
        return {"more": left > right, "fewer": left < right, "equal": left == right}[self.order]


@dataclass(frozen=True)
class Together:
    """Both pictures together have exactly so many objects of the kind."""

    kind: Kind
    number: int

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return sum(self.kind.count(scene) for scene in pair) == self.number


@dataclass(frozen=True)
class GroundsAlike:
    """Both grounds have the same texture, or they differ."""

    same: bool

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return (pair[0].ground.texture == pair[1].ground.texture) == self.same


@dataclass(frozen=True)
class PairSentence:
    """A sentence about two pictures, and what it says."""

    text: str
    meaning: PairStatement


@dataclass(frozen=True)
class PairSet:
    """Two pairs of pictures and two sentences; each sentence is true of one of the pairs."""

    pairs: tuple[Pair, Pair]
    sentences: tuple[PairSentence, PairSentence]

    def label(self, pair: int, sentence: int) -> bool:
        """True if that sentence is true of that pair."""
        return self.sentences[sentence].meaning.holds(self.pairs[pair])


Rule = Callable[[Pair, Dice], PairSentence | None]
"""Finds a true sentence about two pictures, or None if they offer nothing of that sort."""
Feature = tuple[str, str, Statement]
"""What a picture can have: words after `the picture`, words after `both pictures`, and what they say."""


def _shows(kind: Kind) -> Feature:
    words = with_article(plain_phrase(kind))
    return f"shows {words}", f"show {words}", Present((kind,))


def _has_ground(texture: str) -> Feature:
    return f"has a {texture} background", f"have a {texture} background", OnGround(texture)


def _feature(scene: Scene, dice: Dice) -> Feature:
    """Something that this picture has: its background, an object's colour, or more of an object."""
    if dice.chance(0.3):
        return _has_ground(scene.ground.texture)
    thing = dice.choice(scene.objects)
    return _shows(Kind(colour=thing.colour) if dice.chance(0.4) else some_kind(thing, dice))


def _one_side(pair: Pair, dice: Dice) -> PairSentence:
    side = dice.below(2)
    one, _, part = _feature(pair[side], dice)
    return PairSentence(f"the {SIDES[side]} picture {one}", OnSide(side, part))


def _only_side(pair: Pair, dice: Dice) -> PairSentence | None:
    side = dice.below(2)
    one, _, part = _feature(pair[side], dice)
    meaning = OnSide(side, part, only=True)
    if not meaning.holds(pair):
        return None
    here, there = SIDES[side], SIDES[1 - side]
    texts = f"only the {here} picture {one}", f"the {here} picture {one} and the {there} one does not"
    return PairSentence(dice.choice(texts), meaning)


def _exactly_one(pair: Pair, dice: Dice) -> PairSentence | None:
    one, _, part = _feature(dice.choice(pair), dice)
    meaning = InPictures(1, part)
    return PairSentence(f"exactly one of the pictures {one}", meaning) if meaning.holds(pair) else None


def _both(pair: Pair, dice: Dice) -> PairSentence | None:
    _, many, part = _feature(dice.choice(pair), dice)
    meaning = InPictures(2, part)
    return PairSentence(f"both pictures {many}", meaning) if meaning.holds(pair) else None


def _neither(pair: Pair, dice: Dice) -> PairSentence | None:
    which = dice.below(3)
    if which == 0:
        one, _, part = _shows(Kind(colour=dice.choice(COLOURS)))
    elif which == 1:
        one, _, part = _shows(Kind(shape=dice.choice(SHAPES)))
    else:
        one, _, part = _has_ground(dice.choice(TEXTURES))
    meaning = InPictures(0, part)
    return PairSentence(f"neither picture {one}", meaning) if meaning.holds(pair) else None


def _countable(pair: Pair, dice: Dice) -> Kind:
    """All objects, or those of a colour or a shape that one of the pictures has."""
    thing = dice.choice(dice.choice(pair).objects)
    return dice.choice((Kind(), Kind(), Kind(colour=thing.colour), Kind(shape=thing.shape)))


def _compare(pair: Pair, dice: Dice) -> PairSentence:
    kind = _countable(pair, dice)
    words = plain_phrase(kind, many=True)
    left, right = (kind.count(scene) for scene in pair)
    if left == right:
        return PairSentence(f"both pictures show the same number of {words}", SidesCompare(kind, "equal"))
    here, there = SIDES if dice.chance(0.5) else SIDES[::-1]
    order = "more" if (left > right) == (here == "left") else "fewer"
    text = f"there are {order} {words} in the {here} picture than in the {there} one"
    return PairSentence(text, SidesCompare(kind, "more" if left > right else "fewer"))


def _together(pair: Pair, dice: Dice) -> PairSentence | None:
    kind = _countable(pair, dice)
    number = sum(kind.count(scene) for scene in pair)
    if not 2 <= number < len(NUMBERS):
        return None
    text = f"the two pictures together show {NUMBERS[number]} {plain_phrase(kind, many=True)}"
    return PairSentence(text, Together(kind, number))


def _grounds(pair: Pair, dice: Dice) -> PairSentence:
    same = GroundsAlike(True).holds(pair)
    word = "the same background pattern" if same else "different background patterns"
    return PairSentence(f"the two pictures have {word}", GroundsAlike(same))


RULES: tuple[tuple[Rule, int], ...] = (
    (_one_side, 5),
    (_only_side, 3),
    (_exactly_one, 2),
    (_both, 4),
    (_neither, 3),
    (_compare, 4),
    (_together, 1),
    (_grounds, 1),
)
"""All that is said of two pictures, with how often it is tried first."""


def make_sentence(true_of: Pair, false_of: Pair, dice: Dice) -> PairSentence:
    """A sentence that is true of the first pair and false of the second."""
    tries = [rule for rule, weight in RULES for _ in range(weight)]
    for _ in range(100):
        for rule in dice.shuffled(tries):
            sentence = rule(true_of, dice)
            if sentence is not None and not sentence.meaning.holds(false_of):
                return sentence
    raise AssertionError("two random pairs of pictures differ in something")


def make_pair_set(
    split: Split, seed: int, number: int, combinations: Combinations = "seen", max_objects: int = MAX_OBJECTS
) -> PairSet:
    """The set of that number; its pictures are the scenes 4 * number to 4 * number + 3."""
    a, b, c, d = (make_scene(split, seed, 4 * number + i, combinations, max_objects) for i in range(4))
    pairs = (a, b), (c, d)
    dice = Dice(f"scenes/{split}/{seed}/{number}/statements")
    first = dice.below(2)
    sentences = (
        make_sentence(pairs[first], pairs[1 - first], dice),
        make_sentence(pairs[1 - first], pairs[first], dice),
    )
    return PairSet(pairs, sentences)
