"""The words of the world with their synonyms, and phrases made of them. The first of several is the commonest."""

from collections.abc import Mapping

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind

SHAPE_WORDS: Mapping[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
    "hexagon": ("hexagon",),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
}
COLOUR_WORDS: Mapping[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "brown": ("brown", "chestnut"),
    "black": ("black",),
    "white": ("white", "snowy"),
}
SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "big", "huge"),
}
RELATION_WORDS: Mapping[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
PLACE_WORDS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("left",): ("on the left side",),
    ("right",): ("on the right side",),
    ("top",): ("at the top", "in the upper part"),
    ("bottom",): ("at the bottom", "in the lower part"),
    ("middle",): ("in the middle", "in the centre"),
    ("top", "left"): ("in the upper left corner", "at the top left"),
    ("top", "right"): ("in the upper right corner", "at the top right"),
    ("bottom", "left"): ("in the lower left corner", "at the bottom left"),
    ("bottom", "right"): ("in the lower right corner", "at the bottom right"),
}
TEXTURE_WORDS: Mapping[str, tuple[str, ...]] = {
    "plain": ("plain", "smooth"),
    "striped": ("striped",),
    "checkered": ("checkered",),
    "dotted": ("dotted", "spotted"),
    "shaded": ("shaded", "fading"),
    "mottled": ("mottled", "cloudy"),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
COMMON: Mapping[str, tuple[str, ...]] = {
    "picture": ("picture", "image", "scene"),
    "ground": ("background", "ground"),
    "thing": ("shape", "object", "thing"),
    "things": ("shapes", "objects", "things"),
    "larger": ("larger", "bigger"),
    "shape": ("shape", "form"),
    "large": ("large", "big"),
}
"""Slots of templates that mean the same in every scene."""

IRREGULAR = {"box": "boxes", "cross": "crosses", "plus": "plusses", "rhombus": "rhombuses"}


def plural(noun: str) -> str:
    """More than one of it."""
    return IRREGULAR.get(noun, noun + "s")


def with_article(phrase: str) -> str:
    """The phrase after `a` or `an`."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def noun_phrase(kind: Kind, dice: Dice, many: bool = False) -> str:
    """Words for the kind, without an article: `big red circle`, `red shapes`."""
    adjectives = []
    if kind.size is not None:
        adjectives.append(dice.mostly(SIZE_WORDS[kind.size]))
    if kind.colour is not None:
        adjectives.append(dice.mostly(COLOUR_WORDS[kind.colour], 0.8))
    noun = dice.mostly(COMMON["thing"] if kind.shape is None else SHAPE_WORDS[kind.shape])
    return " ".join([*adjectives, plural(noun) if many else noun])


def plain_phrase(kind: Kind, many: bool = False) -> str:
    """The same always in the commonest words, those that answers use: `large red circle`, `red shapes`."""
    noun = "shape" if kind.shape is None else kind.shape
    adjectives = [word for word in (kind.size, kind.colour) if word is not None]
    return " ".join([*adjectives, plural(noun) if many else noun])
