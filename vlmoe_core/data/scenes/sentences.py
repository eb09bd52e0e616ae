"""Sentences for pairs of premise and hypothesis: what to say in, words and synonyms out, with the meaning.

`the circle` also says that there is exactly one circle.
"""

from typing import Literal

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import (
    Alike,
    Both,
    Caption,
    Compare,
    Count,
    Every,
    Kind,
    Larger,
    OnGround,
    Present,
    Related,
)
from vlmoe_core.data.scenes.words import COMMON, NUMBERS, RELATION_WORDS, TEXTURE_WORDS, noun_phrase, with_article
from vlmoe_core.data.scenes.world import OPPOSITES


def _a(kind: Kind, dice: Dice) -> str:
    return with_article(noun_phrase(kind, dice))


def _things(dice: Dice) -> str:
    return dice.mostly(COMMON["things"])


def _adjectives(kind: Kind, dice: Dice) -> str:
    """What follows `is` for one object: `large and red` is `large red` here; a shape makes it `a large red circle`."""
    phrase = noun_phrase(kind, dice)
    return with_article(phrase) if kind.shape is not None else phrase.rpartition(" ")[0]


def there_is(dice: Dice, *kinds: Kind) -> Caption:
    """There are such different objects."""
    listed = " and ".join(_a(kind, dice) for kind in kinds)
    text = dice.choice((f"there is {listed}", f"the picture shows {listed}", f"you can see {listed}"))
    return Caption(text, Present(kinds))


def no(dice: Dice, kind: Kind) -> Caption:
    """There is none."""
    phrase = noun_phrase(kind, dice)
    text = dice.choice((f"there is no {phrase}", f"the picture shows no {phrase}", f"you can see no {phrase}"))
    return Caption(text, Count(kind, 0))


def exactly(dice: Dice, number: int, kind: Kind) -> Caption:
    """There are so many, neither more nor fewer."""
    phrase = f"exactly {NUMBERS[number]} {noun_phrase(kind, dice, many=number != 1)}"
    text = dice.choice((f"there {'is' if number == 1 else 'are'} {phrase}", f"the picture shows {phrase}"))
    return Caption(text, Count(kind, number))


def only(dice: Dice, kind: Kind) -> Caption:
    """There is one object, and it is of the kind."""
    phrase = _a(kind, dice)
    text = dice.choice((f"the only thing is {phrase}", f"there is nothing but {phrase}"))
    return Caption(text, Both((Count(Kind(), 1), Present((kind,)))))


def every(dice: Dice, kind: Kind) -> Caption:
    """All objects are of the kind."""
    phrase = noun_phrase(kind, dice, many=True)
    said = phrase if kind.shape is not None else phrase.rpartition(" ")[0]
    text = dice.choice((f"all {_things(dice)} are {said}", f"there are only {phrase}"))
    return Caption(text, Every(kind))


def all_of(dice: Dice, number: int, kind: Kind) -> Caption:
    """There are so many objects, at least two, and all are of the kind."""
    phrase = noun_phrase(kind, dice, many=True)
    said = phrase if kind.shape is not None else phrase.rpartition(" ")[0]
    return Caption(f"all {NUMBERS[number]} {_things(dice)} are {said}", Both((Every(kind), Count(Kind(), number))))


def the_is(dice: Dice, who: Kind, what: Kind) -> Caption:
    """The only object of kind `who` is also of kind `what`, which names other attributes."""
    both = Kind(who.shape or what.shape, who.colour or what.colour, who.size or what.size)
    text = f"the {noun_phrase(who, dice)} is {_adjectives(what, dice)}"
    return Caption(text, Both((Count(who, 1), Present((both,)))))


def related(dice: Dice, a: Kind, relation: str, b: Kind) -> Caption:
    """The a is on that side of the b."""
    side = dice.mostly(RELATION_WORDS[relation])
    text = f"the {noun_phrase(a, dice)} is {side} the {noun_phrase(b, dice)}"
    return Caption(text, Both((Count(a, 1), Count(b, 1), Related(a, relation, b))))


def turned(dice: Dice, a: Kind, relation: str, b: Kind) -> Caption:
    """The same, said of the b."""
    return related(dice, b, OPPOSITES[relation], a)


def larger(dice: Dice, a: Kind, b: Kind) -> Caption:
    """The a is larger than the b."""
    the_a, the_b = f"the {noun_phrase(a, dice)}", f"the {noun_phrase(b, dice)}"
    text = dice.choice((f"{the_a} is {dice.mostly(COMMON['larger'])} than {the_b}", f"{the_b} is smaller than {the_a}"))
    return Caption(text, Both((Count(a, 1), Count(b, 1), Larger(a, b))))


def as_large(dice: Dice, a: Kind, b: Kind) -> Caption:
    """The a and the b have the same size."""
    the_a, the_b = f"the {noun_phrase(a, dice)}", f"the {noun_phrase(b, dice)}"
    text = dice.choice((f"{the_a} and {the_b} have the same size", f"{the_a} is as large as {the_b}"))
    return Caption(text, Both((Count(a, 1), Count(b, 1), Alike(a, b, "size"))))


def compare(dice: Dice, a: Kind, order: Literal["more", "equal"], b: Kind) -> Caption:
    """There are more a than b, or as many."""
    many_a, many_b = noun_phrase(a, dice, many=True), noun_phrase(b, dice, many=True)
    if order == "equal":
        return Caption(f"there are as many {many_a} as {many_b}", Compare(a, order, b))
    text = dice.choice((f"there are more {many_a} than {many_b}", f"there are fewer {many_b} than {many_a}"))
    return Caption(text, Compare(a, order, b))


def ground(dice: Dice, texture: str) -> Caption:
    """The ground has this texture."""
    word, noun = dice.mostly(TEXTURE_WORDS[texture]), dice.mostly(COMMON["ground"])
    return Caption(f"the {noun} is {word}", OnGround(texture))


def joined(first: Caption, second: Caption) -> Caption:
    """Both sentences."""
    return Caption(f"{first.text} and {second.text}", Both((first.meaning, second.meaning)))
