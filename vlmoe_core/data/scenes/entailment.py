"""Pairs of premise and hypothesis with true labels, for natural-language inference about scenes that nobody sees.

A premise tells a part of a scene, and what it doesn't tell is open. The hypothesis is chosen first, then the label,
then a premise that makes it so: the hypothesis alone tells nothing of the label.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from vlmoe_core.data.scenes import sentences as say
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Caption, Kind
from vlmoe_core.data.scenes.topics import Topic, clash, loose, make_topic, narrow, narrower, wide
from vlmoe_core.data.scenes.world import OPPOSITES, SIZES

Label = Literal["entailment", "neutral", "contradiction"]
LABELS: tuple[Label, ...] = ("entailment", "neutral", "contradiction")
ANY = Kind()
"""Every object is of this kind."""
_ACROSS = {"left": "above", "right": "below", "above": "right", "below": "left"}
"""A relation that says nothing of this one."""


@dataclass(frozen=True)
class Entailment:
    """A premise, a hypothesis and what the first says of the second."""

    premise: Caption
    """A sentence with its meaning."""
    hypothesis: Caption
    """A sentence with its meaning."""
    label: Label
    """entailment: wherever the premise is true, so is the hypothesis; contradiction: nowhere; neutral: in places."""


Maker = Callable[[Topic, Dice], Caption]


@dataclass(frozen=True)
class Form:
    """One sort of hypothesis, with the premises of each label."""

    name: str
    hypothesis: Maker
    premises: Mapping[Label, tuple[Maker, ...]]


def _more_than(number: int, dice: Dice) -> int:
    return number + dice.between(1, 2)


def _other_number(number: int, dice: Dice) -> int:
    return dice.choice([other for other in (1, 2, 3, 4) if other != number])


def _both(t: Topic) -> Kind:
    """Of kind `who` and of kind `what`."""
    return Kind(t.who.shape or t.what.shape, t.who.colour or t.what.colour, t.what.size)


def _seen(t: Topic, dice: Dice) -> Caption:
    """Something of the objects alone."""
    if dice.chance(0.5):
        return say.there_is(dice, t.a)
    return say.exactly(dice, t.number, t.a)


def _all(dice: Dice, number: int, kind: Kind) -> Caption:
    """There are so many objects, and all are of the kind."""
    return say.only(dice, kind) if number == 1 else say.all_of(dice, number, kind)


def _unsized(kind: Kind) -> Kind:
    return replace(kind, size=None)


def _sized(t: Topic, dice: Dice, larger: bool) -> Caption:
    """The sizes of a and b: a larger, or not."""
    pairs = [(x, y) for x in SIZES for y in SIZES if (SIZES.index(x) > SIZES.index(y)) == larger]
    a, b = dice.choice(pairs)
    a_is = say.the_is(dice, _unsized(t.a), Kind(size=a))
    return say.joined(a_is, say.the_is(dice, _unsized(t.b), Kind(size=b)))


def _larger(t: Topic, dice: Dice, pairs: str) -> Caption:
    """`ac cb`: the a is larger than the c, and the c than the b."""
    kinds = {"a": _unsized(t.a), "b": _unsized(t.b), "c": _unsized(t.c)}
    said = [say.larger(dice, kinds[pair[0]], kinds[pair[1]]) for pair in pairs.split()]
    return said[0] if len(said) == 1 else say.joined(said[0], said[1])


_SOME: tuple[Maker, ...] = (
    lambda t, d: say.there_is(d, narrow(t.a, d)),
    lambda t, d: say.there_is(d, narrow(t.a, d), t.b),
    lambda t, d: say.exactly(d, t.number, narrow(t.a, d)),
    lambda t, d: say.only(d, narrow(t.a, d)),
    lambda t, d: say.every(d, narrow(t.a, d)),
)
"""There is an a."""
_NONE: tuple[Maker, ...] = (
    lambda t, d: say.no(d, wide(t.a, d)),
    lambda t, d: say.joined(say.there_is(d, t.b), say.no(d, t.a)),
    lambda t, d: say.only(d, clash(t.a, d)),
    lambda t, d: say.every(d, clash(t.a, d)),
)
"""There is no a."""
_UNTOLD: tuple[Maker, ...] = (
    lambda t, d: say.there_is(d, clash(t.a, d)),
    lambda t, d: say.there_is(d, t.b, t.c),
    lambda t, d: say.exactly(d, t.number, clash(t.a, d)),
    lambda t, d: say.no(d, clash(t.a, d)),
    lambda t, d: say.no(d, narrower(t.a, d)),
    lambda t, d: say.only(d, loose(t.a, d)),
    lambda t, d: say.every(d, loose(t.a, d)),
)
"""Whether there is an a stays open."""

FORMS = (
    Form(
        "exists",
        lambda t, d: say.there_is(d, t.a),
        {"entailment": _SOME, "contradiction": _NONE, "neutral": _UNTOLD},
    ),
    Form(
        "none",
        lambda t, d: say.no(d, t.a),
        {"entailment": _NONE, "contradiction": _SOME, "neutral": _UNTOLD},
    ),
    Form(
        "every",
        lambda t, d: say.every(d, t.a),
        {
            "entailment": (
                lambda t, d: say.every(d, narrow(t.a, d)),
                lambda t, d: say.only(d, narrow(t.a, d)),
                lambda t, d: _all(d, t.number, narrow(t.a, d)),
                lambda t, d: say.joined(say.exactly(d, t.number, ANY), say.exactly(d, t.number, t.a)),
            ),
            "contradiction": (
                lambda t, d: say.there_is(d, clash(t.a, d)),
                lambda t, d: say.exactly(d, t.number, clash(t.a, d)),
                lambda t, d: say.no(d, wide(t.a, d)),
                lambda t, d: say.every(d, clash(t.a, d)),
                lambda t, d: say.only(d, clash(t.a, d)),
                lambda t, d: say.joined(say.exactly(d, t.number + 1, ANY), say.exactly(d, t.number, t.a)),
            ),
            "neutral": (
                lambda t, d: say.there_is(d, narrow(t.a, d)),
                lambda t, d: say.exactly(d, t.number, narrow(t.a, d)),
                lambda t, d: say.every(d, loose(t.a, d)),
                lambda t, d: say.only(d, loose(t.a, d)),
                lambda t, d: say.no(d, clash(t.a, d)),
            ),
        },
    ),
    Form(
        "count",
        lambda t, d: say.exactly(d, t.number, t.a),
        {
            "entailment": (
                lambda t, d: say.exactly(d, t.number, t.a),
                lambda t, d: _all(d, t.number, narrow(t.a, d)),
                lambda t, d: say.joined(say.exactly(d, t.number, ANY), say.every(d, t.a)),
            ),
            "contradiction": (
                lambda t, d: say.exactly(d, _other_number(t.number, d), t.a),
                lambda t, d: _all(d, _other_number(t.number, d), narrow(t.a, d)),
                lambda t, d: say.no(d, wide(t.a, d)),
                lambda t, d: say.every(d, clash(t.a, d)),
                lambda t, d: say.joined(say.exactly(d, t.number, ANY), say.there_is(d, clash(t.a, d))),
            ),
            "neutral": (
                lambda t, d: say.there_is(d, t.a),
                lambda t, d: say.exactly(d, t.number, clash(t.a, d)),
                lambda t, d: say.exactly(d, t.number, narrower(t.a, d)),
                lambda t, d: say.exactly(d, t.number, loose(t.a, d)),
                lambda t, d: say.exactly(d, _more_than(t.number, d), ANY),
                lambda t, d: say.every(d, loose(t.a, d)),
            ),
        },
    ),
    Form(
        "attribute",
        lambda t, d: say.the_is(d, t.who, t.what),
        {
            "entailment": (
                lambda t, d: say.the_is(d, t.who, t.what),
                lambda t, d: say.joined(say.exactly(d, 1, t.who), say.every(d, t.what)),
                lambda t, d: say.joined(say.exactly(d, 1, t.who), say.exactly(d, 1, _both(t))),
            ),
            "contradiction": (
                lambda t, d: say.the_is(d, t.who, t.unlike),
                lambda t, d: say.joined(say.exactly(d, 1, t.who), say.every(d, t.unlike)),
                lambda t, d: say.joined(say.exactly(d, 1, t.who), say.no(d, _both(t))),
            ),
            "neutral": (
                lambda t, d: say.the_is(d, t.other, t.what),
                lambda t, d: say.the_is(d, t.who, t.third),
                lambda t, d: say.joined(say.exactly(d, 1, t.who), say.there_is(d, t.what)),
            ),
        },
    ),
    Form(
        "relation",
        lambda t, d: say.related(d, t.a, t.relation, t.b),
        {
            "entailment": (
                lambda t, d: say.related(d, t.a, t.relation, t.b),
                lambda t, d: say.turned(d, t.a, t.relation, t.b),
                lambda t, d: say.joined(say.turned(d, t.a, t.relation, t.b), say.there_is(d, t.c)),
            ),
            "contradiction": (
                lambda t, d: say.related(d, t.a, OPPOSITES[t.relation], t.b),
                lambda t, d: say.turned(d, t.a, OPPOSITES[t.relation], t.b),
                lambda t, d: say.joined(say.turned(d, t.a, OPPOSITES[t.relation], t.b), say.there_is(d, t.c)),
            ),
            "neutral": (
                lambda t, d: say.related(d, t.a, t.relation, t.c),
                lambda t, d: say.turned(d, t.a, _ACROSS[t.relation], t.b),
                lambda t, d: say.joined(say.turned(d, t.c, t.relation, t.b), say.there_is(d, t.a)),
            ),
        },
    ),
    Form(
        "larger",
        lambda t, d: _larger(t, d, "ab"),
        {
            "entailment": (
                lambda t, d: _larger(t, d, "ab"),
                lambda t, d: _larger(t, d, "ac cb"),
                lambda t, d: _sized(t, d, larger=True),
            ),
            "contradiction": (
                lambda t, d: _larger(t, d, "ba"),
                lambda t, d: _larger(t, d, "bc ca"),
                lambda t, d: _sized(t, d, larger=False),
                lambda t, d: say.as_large(d, _unsized(t.a), _unsized(t.b)),
            ),
            "neutral": (
                lambda t, d: _larger(t, d, "ac"),
                lambda t, d: _larger(t, d, "cb"),
                lambda t, d: _larger(t, d, "ac bc"),
                lambda t, d: say.as_large(d, _unsized(t.a), _unsized(t.c)),
            ),
        },
    ),
    Form(
        "more",
        lambda t, d: say.compare(d, t.a, "more", t.b),
        {
            "entailment": (
                lambda t, d: say.compare(d, t.a, "more", t.b),
                lambda t, d: say.joined(say.exactly(d, t.number + 1, t.a), say.exactly(d, 1, t.b)),
                lambda t, d: say.joined(say.there_is(d, t.a), say.no(d, t.b)),
                lambda t, d: say.every(d, narrow(t.a, d)),
            ),
            "contradiction": (
                lambda t, d: say.compare(d, t.b, "more", t.a),
                lambda t, d: say.compare(d, t.a, "equal", t.b),
                lambda t, d: say.joined(say.exactly(d, 1, t.a), say.exactly(d, t.number + 1, t.b)),
                lambda t, d: say.joined(say.there_is(d, t.b), say.no(d, t.a)),
                lambda t, d: say.every(d, narrow(t.b, d)),
            ),
            "neutral": (
                lambda t, d: say.compare(d, t.a, "more", t.c),
                lambda t, d: say.compare(d, t.a, "equal", t.c),
                lambda t, d: say.there_is(d, t.a, t.b),
                lambda t, d: say.joined(say.exactly(d, min(t.number, 2), t.a), say.exactly(d, 1, t.c)),
                lambda t, d: say.every(d, loose(t.a, d)),
            ),
        },
    ),
    Form(
        "ground",
        lambda t, d: say.ground(d, t.textures[0]),
        {
            "entailment": (lambda t, d: say.joined(_seen(t, d), say.ground(d, t.textures[0])),),
            "contradiction": (lambda t, d: say.joined(_seen(t, d), say.ground(d, t.textures[1])),),
            "neutral": (_seen, lambda t, d: say.joined(_seen(t, d), say.there_is(d, t.c))),
        },
    ),
)
"""All hypotheses, and the premises of each label."""


def make_entailment(dice: Dice) -> Entailment:
    """A pair of sentences. Each label is as likely as the others, whatever the hypothesis."""
    form = dice.choice(FORMS)
    topic = make_topic(dice)
    label = dice.choice(LABELS)
    return fill(form, label, dice.choice(form.premises[label]), topic, dice)


def fill(form: Form, label: Label, maker: Maker, topic: Topic, dice: Dice) -> Entailment:
    """The hypothesis of the form and that premise; now and then the premise also tells of the ground."""
    premise, hypothesis = maker(topic, dice), form.hypothesis(topic, dice)
    if form.name != "ground" and dice.chance(0.25):
        premise = say.joined(premise, say.ground(dice, topic.textures[0]))
    return Entailment(premise, hypothesis, label)
