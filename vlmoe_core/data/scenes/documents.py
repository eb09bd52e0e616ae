"""Short texts without pictures: facts about everyday things and shapes, small stories, imagined scenes.

What they say is always true, or follows within the text, so that a hidden word can often be found by reason.
"""

from collections.abc import Callable, Mapping

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.language import make_caption
from vlmoe_core.data.scenes.words import NUMBERS, SHAPE_WORDS, plural, with_article
from vlmoe_core.data.scenes.world import OPPOSITES, sample_scene

COLOURED: Mapping[str, tuple[str, ...]] = {
    "red": ("a tomato", "a strawberry", "a cherry"),
    "orange": ("a carrot", "a pumpkin"),
    "yellow": ("a banana", "a lemon", "the sun"),
    "green": ("the grass", "a leaf", "a frog"),
    "blue": ("the sky", "the sea"),
    "purple": ("a plum", "a grape"),
    "pink": ("a pig", "a flamingo"),
    "brown": ("chocolate", "wood", "a bear"),
    "black": ("coal", "a raven", "the night"),
    "white": ("snow", "milk", "a swan"),
}
SHAPED: Mapping[str, tuple[str, ...]] = {
    "circle": ("a coin", "a plate"),
    "square": ("a window", "a tile"),
    "triangle": ("a tent", "a roof"),
    "star": ("a starfish",),
    "diamond": ("a kite",),
    "ring": ("a tyre", "a bracelet"),
    "crescent": ("the new moon",),
}
SHAPE_FACTS: Mapping[str, tuple[str, ...]] = {
    "circle": ("is round", "has no corners"),
    "square": ("has four equal sides", "has four corners"),
    "triangle": ("has three sides", "has three corners"),
    "star": ("has five points",),
    "cross": ("has four arms",),
    "diamond": ("has four sides", "stands on one corner"),
    "hexagon": ("has six sides", "has six corners"),
    "heart": ("has one point at the bottom",),
    "ring": ("is round", "has a hole in the middle"),
    "crescent": ("has two points", "is like the new moon"),
}
ANIMALS = ("an ant", "a mouse", "a cat", "a dog", "a horse", "an elephant")
"""From small to large."""
CHILDREN = (("Anna", "her"), ("Mia", "her"), ("Ben", "him"), ("Tom", "him"))
GOODS = ("apple", "pear", "cup", "book", "ball")
PLACED = ("cup", "plate", "lamp", "book", "chair")
SIDES: Mapping[str, str] = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

Topic = Callable[[Dice], list[str]]


def make_document(dice: Dice) -> list[str]:
    """The two to six sentences of one document, mostly about one sort of thing."""
    wanted = dice.between(2, 6)
    topic = dice.choice(_TOPICS)
    sentences: list[str] = []
    while len(sentences) < wanted:
        sentences += topic(dice)
        topic = topic if dice.chance(0.7) else dice.choice(_TOPICS)
    return [_sentence(words) for words in sentences[:wanted]]


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _colours(dice: Dice) -> list[str]:
    colour = dice.choice(tuple(COLOURED))
    first, second = dice.shuffled(COLOURED[colour])[:2]
    other = dice.choice([name for name in COLOURED if name != colour])
    third = dice.choice(COLOURED[other])
    return dice.choice(
        (
            [f"{first} is {colour}"],
            [f"{first} is {colour}, and {second} is {colour} too"],
            [f"{first} is {colour}, but {third} is {other}"],
            [f"{first} is as {colour} as {second}"],
            [f"{first} has the same colour as {second}", f"both are {colour}"],
        )
    )


def _shapes(dice: Dice) -> list[str]:
    shape = dice.choice(tuple(SHAPE_FACTS))
    synonyms = SHAPE_WORDS[shape]
    sentences = [f"{with_article(dice.mostly(synonyms))} {dice.choice(SHAPE_FACTS[shape])}"]
    if len(synonyms) > 1 and dice.chance(0.3):
        sentences.append(f"another word for {synonyms[0]} is {synonyms[1]}")
    if shape in SHAPED and dice.chance(0.5):
        sentences.append(f"{dice.choice(SHAPED[shape])} has the shape of {with_article(shape)}")
    return sentences


def _numbers(dice: Dice) -> list[str]:
    a = dice.between(1, 5)
    b = dice.between(1, 6 - a)
    first, second, total = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
    return dice.choice(
        (
            [f"{first} and {second} make {total}"],
            [f"{total} is more than {first}"],
            [f"{second} is less than {total}"],
            [f"after {first} comes {NUMBERS[a + 1]}"],
            [f"{total} without {second} is {first}"],
        )
    )


def _sizes(dice: Dice) -> list[str]:
    small, middle, large = sorted(dice.shuffled(range(len(ANIMALS)))[:3])
    a, b, c = ANIMALS[small], ANIMALS[middle], ANIMALS[large]
    return dice.choice(
        (
            [f"{c} is bigger than {a}"],
            [f"{a} is smaller than {b}"],
            [f"{c} is bigger than {b}", f"{b} is bigger than {a}", f"so {c} is bigger than {a}"],
        )
    )


def _story(dice: Dice) -> list[str]:
    """Somebody has things, gets or loses some, and then has so many."""
    (name, whom), (other, _) = dice.shuffled(CHILDREN)[:2]
    good = dice.choice(GOODS)
    before = dice.between(1, 5)
    more = dice.between(1, 6 - before)
    fewer, after = _many(before, good), _many(before + more, good)
    if dice.chance(0.5):
        return [f"{name} has {fewer}", f"{other} gives {whom} {NUMBERS[more]} more", f"now {name} has {after}"]
    return [f"{name} has {after}", f"{other} takes {NUMBERS[more]} of them", f"now {name} has {fewer}"]


def _many(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def _sides(dice: Dice) -> list[str]:
    """One relation of two things, and what follows."""
    a, b = dice.shuffled(PLACED)[:2]
    side = dice.choice(tuple(SIDES))
    back = SIDES[OPPOSITES[side]]
    return dice.choice(
        (
            [f"the {a} is {SIDES[side]} the {b}", f"so the {b} is {back} the {a}"],
            [f"if the {a} is {SIDES[side]} the {b}, then the {b} is {back} the {a}"],
            [f"{side} is the opposite of {OPPOSITES[side]}"],
        )
    )


def _imagined(dice: Dice) -> list[str]:
    """Some captions of a picture that is never drawn; never a held-out pair, in no split."""
    scene = sample_scene(dice, "seen")
    captions = dict.fromkeys(make_caption(scene, dice).text for _ in range(dice.between(1, 4)))
    return ["imagine a picture", *captions]


_TOPICS: tuple[Topic, ...] = (_colours, _shapes, _numbers, _sizes, _story, _sides, _imagined, _imagined)
