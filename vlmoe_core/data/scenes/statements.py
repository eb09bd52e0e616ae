"""Statements about two pictures that are true of one pair and false of another, after the manner of NLVR2.

A set is two pairs of pictures and two sentences. Each sentence is true of one of the pairs and false of the other, and
each pair has one true and one false sentence: neither sentences nor pictures alone tell which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind, OnGround, Present
from vlmoe_core.data.scenes.ground import is_dark
from vlmoe_core.data.scenes.pair_statements import (
    DarkerGround,
    DarkGround,
    GroundsAlike,
    InPictures,
    LargestShape,
    OnSide,
    Pair,
    PairStatement,
    SidesCompare,
    Together,
)
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

SIDES = ("left", "right")
M = TypeVar("M", bound=PairStatement)


@dataclass(frozen=True)
class PairSentence:
    """A sentence about two pictures, and what it says."""

    text: str
    meaning: PairStatement
    statement_type: str
    """The rule that found it."""


@dataclass(frozen=True)
class PairSet:
    """Two pairs of pictures and two sentences; each sentence is true of one of the pairs."""

    pairs: tuple[Pair, Pair]
    sentences: tuple[PairSentence, PairSentence]

    def label(self, pair: int, sentence: int) -> bool:
        """True if that sentence is true of that pair."""
        return self.sentences[sentence].meaning.holds(self.pairs[pair])


Said = tuple[str, PairStatement]
"""Words and what they say."""
Rule = Callable[[Pair, Dice], Said | None]
"""Finds something that is true of two pictures, or None if they offer nothing of that sort."""
Feature = tuple[str, str, Statement]
"""What a picture can have: words after `the picture`, words after `both pictures`, and what they say."""


def _shows(kind: Kind) -> Feature:
    words = with_article(plain_phrase(kind))
    return f"shows {words}", f"show {words}", Present((kind,))


def _has_ground(word: str, part: Statement) -> Feature:
    return f"has a {word} background", f"have a {word} background", part


def _feature(scene: Scene, dice: Dice) -> Feature:
    """Something that this picture has: its background, light or dark, an object's colour, or more of an object."""
    if dice.chance(0.5):
        return _has_ground("dark" if is_dark(scene.ground) else "light", DarkGround(is_dark(scene.ground)))
    if dice.chance(0.3):
        return _has_ground(scene.ground.texture, OnGround(scene.ground.texture))
    thing = dice.choice(scene.objects)
    return _shows(Kind(colour=thing.colour) if dice.chance(0.4) else some_kind(thing, dice))


def _one_side(pair: Pair, dice: Dice) -> Said:
    side = dice.below(2)
    one, _, part = _feature(pair[side], dice)
    return f"the {SIDES[side]} picture {one}", OnSide(side, part)


def _only_side(pair: Pair, dice: Dice) -> Said | None:
    side = dice.below(2)
    one, _, part = _feature(pair[side], dice)
    meaning = OnSide(side, part, only=True)
    if not meaning.holds(pair):
        return None
    here, there = SIDES[side], SIDES[1 - side]
    texts = f"only the {here} picture {one}", f"the {here} picture {one} and the {there} one does not"
    return dice.choice(texts), meaning


def _exactly_one(pair: Pair, dice: Dice) -> Said | None:
    one, _, part = _feature(dice.choice(pair), dice)
    meaning = InPictures(1, part)
    return (f"exactly one of the pictures {one}", meaning) if meaning.holds(pair) else None


def _both(pair: Pair, dice: Dice) -> Said | None:
    _, many, part = _feature(dice.choice(pair), dice)
    meaning = InPictures(2, part)
    return (f"both pictures {many}", meaning) if meaning.holds(pair) else None


def _neither(pair: Pair, dice: Dice) -> Said | None:
    which = dice.below(3)
    if which == 0:
        one, _, part = _shows(Kind(colour=dice.choice(COLOURS)))
    elif which == 1:
        one, _, part = _shows(Kind(shape=dice.choice(SHAPES)))
    else:
        texture = dice.choice(TEXTURES)
        one, _, part = _has_ground(texture, OnGround(texture))
    meaning = InPictures(0, part)
    return (f"neither picture {one}", meaning) if meaning.holds(pair) else None


def _countable(pair: Pair, dice: Dice) -> Kind:
    """All objects, or those of a colour or a shape that one of the pictures has."""
    thing = dice.choice(dice.choice(pair).objects)
    return dice.choice((Kind(), Kind(), Kind(colour=thing.colour), Kind(shape=thing.shape)))


def _compare(pair: Pair, dice: Dice) -> Said:
    kind = _countable(pair, dice)
    if kind.count(pair[0]) == kind.count(pair[1]):
        text = f"both pictures show the same number of {plain_phrase(kind, many=True)}"
        return text, SidesCompare(kind, "equal")
    return _more(pair, kind, dice)


def _total(pair: Pair, dice: Dice) -> Said | None:
    left, right = (len(scene.objects) for scene in pair)
    return None if left == right else _more(pair, Kind(), dice)


def _more(pair: Pair, kind: Kind, dice: Dice) -> Said:
    """Which picture has more of them; the other way round, which has fewer."""
    left, right = (kind.count(scene) for scene in pair)
    here, there = SIDES if dice.chance(0.5) else SIDES[::-1]
    order = "more" if (left > right) == (here == "left") else "fewer"
    text = f"there are {order} {plain_phrase(kind, many=True)} in the {here} picture than in the {there} one"
    return text, SidesCompare(kind, "more" if left > right else "fewer")


def _together(pair: Pair, dice: Dice) -> Said | None:
    kind = _countable(pair, dice)
    number = sum(kind.count(scene) for scene in pair)
    if not 2 <= number < len(NUMBERS):
        return None
    text = f"the two pictures together show {NUMBERS[number]} {plain_phrase(kind, many=True)}"
    return text, Together(kind, number)


def _grounds(pair: Pair, dice: Dice) -> Said:
    same = GroundsAlike(True).holds(pair)
    word = "the same background pattern" if same else "different background patterns"
    return f"the two pictures have {word}", GroundsAlike(same)


def _darker(pair: Pair, dice: Dice) -> Said | None:
    meaning = _true_one(pair, (DarkerGround(0), DarkerGround(1)))
    if meaning is None:
        return None
    side = dice.below(2)
    word = "darker" if side == meaning.side else "lighter"
    return f"the background of the {SIDES[side]} picture is {word} than that of the {SIDES[1 - side]} one", meaning


def _largest(pair: Pair, dice: Dice) -> Said | None:
    meaning = _true_one(pair, (LargestShape(0), LargestShape(1)))
    return None if meaning is None else (f"the largest shape is in the {SIDES[meaning.side]} picture", meaning)


def _true_one(pair: Pair, meanings: Sequence[M]) -> M | None:
    return next((meaning for meaning in meanings if meaning.holds(pair)), None)


@dataclass(frozen=True)
class StatementType:
    """A sort of statement."""

    name: str
    """Accuracy is reported of each."""
    rule: Rule
    """What finds one."""
    weight: int = 1
    """How often it is tried first."""


STATEMENT_TYPES = (
    StatementType("darker", _darker, 30),
    StatementType("total", _total, 12),
    StatementType("largest", _largest, 6),
    StatementType("one side", _one_side, 16),
    StatementType("only side", _only_side, 3),
    StatementType("exactly one", _exactly_one, 6),
    StatementType("both", _both, 10),
    StatementType("neither", _neither, 3),
    StatementType("compare", _compare, 4),
    StatementType("together", _together),
    StatementType("grounds", _grounds),
)
"""All that is said of two pictures. What whole pictures show comes most.

Of what is said of single things a small model learns nothing in its first thousands of steps: so many words and looks
must each be met together before any of them helps.
"""


def make_sentence(true_of: Pair, false_of: Pair, dice: Dice) -> PairSentence:
    """A sentence that is true of the first pair and false of the second."""
    tries = [sort for sort in STATEMENT_TYPES for _ in range(sort.weight)]
    for _ in range(100):
        for sort in dice.shuffled(tries):
            said = sort.rule(true_of, dice)
            if said is not None and not said[1].holds(false_of):
                return PairSentence(*said, sort.name)
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
