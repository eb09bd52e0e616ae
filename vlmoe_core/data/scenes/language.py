"""Captions: sentences that are true of a scene. A pattern is one template, filled by the rule of its family."""

from dataclasses import dataclass

from vlmoe_core.data.scenes import rules
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Caption
from vlmoe_core.data.scenes.words import COMMON
from vlmoe_core.data.scenes.world import Scene


@dataclass(frozen=True)
class Family:
    """Several ways to put one sort of truth."""

    rule: rules.Rule
    templates: tuple[str, ...]
    weight: int = 1
    """How often it is tried first, relative to the others."""


FAMILIES = (
    Family(
        rules.one,
        (
            "there is {a} in the {picture}",
            "this {picture} shows {a}",
            "somewhere in the {picture} you can see {a}",
        ),
    ),
    Family(
        rules.one_on_ground,
        ("{a} on a {texture} {ground}", "the {ground} is {texture} and {a} lies on it"),
        weight=2,
    ),
    Family(
        rules.alone,
        (
            "{a} is the only {thing} in the {picture}",
            "there is nothing in the {picture} but {a}",
            "{a} stands all alone",
        ),
    ),
    Family(
        rules.several(2),
        (
            "{a} and {b} in one {picture}",
            "the {picture} shows {a} together with {b}",
            "there is {a} and there is also {b}",
        ),
        weight=2,
    ),
    Family(rules.several(3), ("{a}, {b} and {c}", "we can see {a} with {b} and {c}"), weight=2),
    Family(
        rules.relation,
        (
            "{a} {rel} {b}",
            "{a} is {rel} {b}",
            "there is {a} {rel} {b}",
            "{rel} {b} there is {a}",
        ),
        weight=4,
    ),
    Family(
        rules.known_relation,
        (
            "the {picture} shows {the_a} {rel} {the_b}",
            "{the_a} is {rel} {the_b}",
            "{the_a} lies {rel} {the_b}",
            "look {rel} {the_b} to find {the_a}",
        ),
        weight=3,
    ),
    Family(
        rules.two_relations,
        ("{the_a} is {rel} {the_b} and {rel_c} {the_c}", "{rel} {the_b} and {rel_c} {the_c} is {the_a}"),
        weight=2,
    ),
    Family(rules.place, ("{a} {place} of the {picture}", "{place} of the {picture} there is {a}"), weight=2),
    Family(
        rules.total,
        (
            "there are {n} {things} in the {picture}",
            "the {picture} contains exactly {n} {things}",
            "{n} {things} can be seen in all",
        ),
    ),
    Family(rules.total_on_ground, ("{n} {things} on a {texture} {ground}",)),
    Family(
        rules.repeated,
        ("there are {n} {ks} in the {picture}", "exactly {n} of the {things} are {ks}", "we count {n} {ks}"),
        weight=2,
    ),
    Family(rules.absent, ("the {picture} shows {a} but no {k}", "there is {a} and there is no {k}")),
    Family(rules.absent_colour, ("none of the {n} {things} is {colour_word}",)),
    Family(rules.comparison, ("there are {order} {ks} than {ls}", "we can see {order} {ks} than {ls} here")),
    Family(rules.equal, ("there are as many {ks} as {ls}",)),
    Family(rules.all_are, ("all {n} {things} are {adjective}", "each of the {n} {things} is {adjective}")),
    Family(rules.all_kind, ("there are only {ks} in the {picture}",)),
    Family(rules.larger, ("{the_a} is {larger} than {the_b}", "{the_b} is smaller than {the_a}")),
    Family(
        rules.alike("colour", True), ("{the_a} and {the_b} have the same colour", "{the_a} has the colour of {the_b}")
    ),
    Family(rules.alike("colour", False), ("{the_a} and {the_b} differ in colour",)),
    Family(rules.alike("size", True), ("{the_a} is as {large} as {the_b}", "{the_a} and {the_b} have the same size")),
    Family(rules.alike("shape", True), ("{the_a} and {the_b} have the same {shape}",)),
    Family(rules.colour_of, ("the colour of {the_a} is {colour_word}", "{the_a} in the {picture} is {colour_word}")),
    Family(rules.colour_not, ("{the_a} is {colour_word}, not {other}",)),
    Family(rules.shape_of, ("{the_a} is {shape_word}", "the {shape} of {the_a} is {shape_word}")),
    Family(rules.size_of, ("{the_a} in the {picture} is {size_word}",)),
)
"""All that captions can say, and how."""


def make_caption(scene: Scene, dice: Dice) -> Caption:
    """A true sentence about the scene: of the sorts of truth that it offers one, by weight, in one of its ways."""
    tries = [family for family in FAMILIES for _ in range(family.weight)]
    for family in dice.shuffled(tries):
        caption = fill(family, dice.choice(family.templates), scene, dice)
        if caption is not None:
            return caption
    raise AssertionError("a scene holds at least one object, and the first rule always finds it")


def fill(family: Family, template: str, scene: Scene, dice: Dice) -> Caption | None:
    """The template's sentence about the scene, or None where the scene offers nothing of that sort."""
    filled = family.rule(scene, dice)
    if filled is None:
        return None
    slots, meaning = filled
    common = {slot: dice.mostly(words) for slot, words in COMMON.items()}
    return Caption(template.format(**(common | dict(slots))), meaning)
