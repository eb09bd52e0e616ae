"""What a pair of sentences speaks of: kinds of objects, and kinds that include, exclude or leave them open."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind
from vlmoe_core.data.scenes.world import COLOURS, RELATIONS, SEEN_PAIRS, SHAPES, SIZES, TEXTURES

ATTRIBUTES = ("shape", "colour", "size")


@dataclass(frozen=True)
class Topic:
    """What a pair of sentences is about."""

    a: Kind
    """The kind that the hypothesis is about. It names one or two attributes."""
    b: Kind
    """A kind with the same attributes named and all of them different."""
    c: Kind
    """Another one, different from both."""
    who: Kind
    """A kind of one attribute, shape or colour."""
    what: Kind
    """Another attribute that an object of `who` may have."""
    third: Kind
    """The third one."""
    other: Kind
    """As `who`, with another value."""
    unlike: Kind
    """As `what`, with another value."""
    number: int
    """1 to 3."""
    relation: str
    """One of RELATIONS."""
    textures: tuple[str, str]
    """Two different ones."""


def make_topic(dice: Dice) -> Topic:
    """Things to speak of, at random. No held-out pair of colour and shape is among them."""
    named = dice.choice((("shape",), ("colour",), ("shape", "colour"), ("shape", "size"), ("colour", "size")))
    while True:
        looks = zip(dice.shuffled(SHAPES), dice.shuffled(COLOURS), dice.shuffled(SIZES), strict=False)
        kinds = [Kind(shape, colour, size) for shape, colour, size in looks]
        mixed = [(kinds[0].colour, kinds[1].shape), (kinds[1].colour, kinds[0].shape)]
        if all(pair in SEEN_PAIRS for pair in [*mixed, *((kind.colour, kind.shape) for kind in kinds)]):
            break
    a, b, c = (_keep(kind, named) for kind in kinds)
    who, what = dice.choice((("shape", "colour"), ("shape", "size"), ("colour", "shape"), ("colour", "size")))
    (third,) = {*ATTRIBUTES} - {who, what}
    first, second = dice.shuffled(TEXTURES)[:2]
    return Topic(
        a,
        b,
        c,
        who=_keep(kinds[0], [who]),
        what=_keep(kinds[0], [what]),
        third=_keep(kinds[0], [third]),
        other=_keep(kinds[1], [who]),
        unlike=_keep(kinds[1], [what]),
        number=dice.between(1, 3),
        relation=dice.choice(RELATIONS),
        textures=(first, second),
    )


def _named(kind: Kind) -> list[str]:
    return [name for name in ATTRIBUTES if getattr(kind, name) is not None]


def _keep(kind: Kind, names: Sequence[str]) -> Kind:
    """The kind with these attributes alone."""
    return Kind(**{name: getattr(kind, name) for name in names})


def narrower(kind: Kind, dice: Dice) -> Kind:
    """The kind with one more attribute."""
    missing = dice.choice([name for name in ATTRIBUTES if getattr(kind, name) is None])
    if missing == "size":
        return replace(kind, size=dice.choice(SIZES))
    fitting = [Kind(s, c, kind.size) for c, s in SEEN_PAIRS if kind.shape in (None, s) and kind.colour in (None, c)]
    return _keep(dice.choice(fitting), [*_named(kind), missing])


def narrow(kind: Kind, dice: Dice) -> Kind:
    """The kind itself, or with one more attribute: whatever fits it fits the kind."""
    return kind if dice.chance(0.35) else narrower(kind, dice)


def wide(kind: Kind, dice: Dice) -> Kind:
    """The kind itself, or less one of two attributes: whatever fits the kind fits it."""
    names = _named(kind)
    return kind if len(names) == 1 or dice.chance(0.4) else _keep(kind, [dice.choice(names)])


def clash(kind: Kind, dice: Dice) -> Kind:
    """The kind with one attribute changed: nothing fits both."""
    name = dice.choice(_named(kind))
    values = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[name]
    changed = [replace(kind, **{name: value}) for value in values if value != getattr(kind, name)]
    return dice.choice([k for k in changed if None in (k.shape, k.colour) or (k.colour, k.shape) in SEEN_PAIRS])


def loose(kind: Kind, dice: Dice) -> Kind:
    """A kind that lacks one attribute of this one: what fits it may fit the kind or not."""
    names = _named(kind)
    if len(names) == 2:
        return _keep(kind, [dice.choice(names)])
    return _keep(narrower(kind, dice), [name for name in ATTRIBUTES if name != names[0]])
