"""Questions about a scene with one right answer each, for visual question answering.

The words of a question tell little about its answer: a question with the answer no is one with the answer yes in which
one word was exchanged for another that is as common, and open answers are spread over all values.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind
from vlmoe_core.data.scenes.words import plain_phrase, with_article
from vlmoe_core.data.scenes.world import (
    COLOURS,
    HELD_OUT,
    OPPOSITES,
    PAIRS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    relations,
)

AnswerType = Literal["yes/no", "number", "other"]
"""The three of VQA v2."""


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    text: str
    """The question."""
    answer: str
    """A single word: yes, no, a digit 0..6, or a colour, shape, size, place or texture as world.py names it."""
    answer_type: AnswerType
    """What sort of answer it has."""
    question_type: str
    """What it asks for, a name in QUESTION_TYPES."""


Slots = Mapping[str, str]
Asked = tuple[Slots, str]
"""Words for the slots of the templates, and the answer."""
Asker = Callable[[Scene, Dice], Asked | None]
"""Finds something to ask about a scene, or None if it offers nothing of that sort."""


@dataclass(frozen=True)
class QuestionType:
    """One sort of question."""

    name: str
    answer_type: AnswerType
    ask: Asker
    templates: tuple[str, ...]
    weight: int = 1
    """How often it is tried first, relative to the others."""


def nameable_pairs(scene: Scene) -> Sequence[tuple[str, str]]:
    """The (colour, shape) that a sentence about this scene may name: held-out ones only where the scene has one."""
    return PAIRS if any((thing.colour, thing.shape) in HELD_OUT for thing in scene.objects) else SEEN_PAIRS


def absent_kinds(scene: Scene, kind: Kind) -> list[Kind]:
    """All kinds that differ from this one (colour, shape or both) in one attribute and of which the scene has none."""
    changed: list[Kind] = []
    if kind.colour is not None:
        changed += [Kind(kind.shape, colour) for colour in COLOURS if colour != kind.colour]
    if kind.shape is not None:
        changed += [Kind(shape, kind.colour) for shape in SHAPES if shape != kind.shape]
    nameable = nameable_pairs(scene)
    return [
        other
        for other in changed
        if other.count(scene) == 0
        and (other.colour is None or other.shape is None or (other.colour, other.shape) in nameable)
    ]


def some_kind(thing: SceneObject, dice: Dice) -> Kind:
    """Its colour, its shape or both."""
    which = dice.below(3)
    return Kind(None if which == 0 else thing.shape, None if which == 1 else thing.colour)


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _unique(scene: Scene, dice: Dice, kinds: Callable[[SceneObject], Iterable[Kind]]) -> list[tuple[SceneObject, Kind]]:
    """Objects that one of the kinds fits alone, with that kind, in random order."""
    found = []
    for thing in dice.shuffled(scene.objects):
        fitting = [kind for kind in kinds(thing) if kind.count(scene) == 1]
        if fitting:
            found.append((thing, dice.choice(fitting)))
    return found


def _by_shape(thing: SceneObject) -> Iterable[Kind]:
    return (Kind(thing.shape),)


def _by_colour(thing: SceneObject) -> Iterable[Kind]:
    return (Kind(colour=thing.colour),)


def _by_any(thing: SceneObject) -> Iterable[Kind]:
    return Kind(thing.shape), Kind(colour=thing.colour), Kind(thing.shape, thing.colour)


def _colour(scene: Scene, dice: Dice) -> Asked | None:
    known = _unique(scene, dice, _by_shape)
    return ({"a": plain_phrase(known[0][1])}, known[0][0].colour) if known else None


def _shape(scene: Scene, dice: Dice) -> Asked | None:
    known = _unique(scene, dice, _by_colour)
    return ({"colour": known[0][0].colour}, known[0][0].shape) if known else None


def _size(scene: Scene, dice: Dice) -> Asked | None:
    known = _unique(scene, dice, _by_any)
    return ({"a": plain_phrase(known[0][1])}, known[0][0].size) if known else None


def _place(scene: Scene, dice: Dice) -> Asked | None:
    """Where an object is that is not in a corner: each place as often as scenes offer it."""
    known = [(thing, kind) for thing, kind in _unique(scene, dice, _by_any) if len(thing.places) == 1]
    if not known:
        return None
    place = dice.choice(sorted({min(thing.places) for thing, _ in known}))
    kind = next(kind for thing, kind in known if place in thing.places)
    return {"a": plain_phrase(kind)}, place


def _texture(scene: Scene, dice: Dice) -> Asked | None:
    return {}, scene.ground.texture


def _is_texture(scene: Scene, dice: Dice) -> Asked | None:
    is_so = dice.chance(0.5)
    others = [texture for texture in TEXTURES if texture != scene.ground.texture]
    return {"texture": scene.ground.texture if is_so else dice.choice(others)}, _yes(is_so)


def _total(scene: Scene, dice: Dice) -> Asked | None:
    return {}, str(len(scene.objects))


def _count(scene: Scene, dice: Dice) -> Asked | None:
    """How many are of a colour or a shape: each number as often as scenes offer it."""
    kinds = [Kind(colour=c) for c in COLOURS] if dice.chance(0.5) else [Kind(shape=s) for s in SHAPES]
    number = dice.choice(sorted({kind.count(scene) for kind in kinds}))
    kind = dice.choice([kind for kind in kinds if kind.count(scene) == number])
    return {"ks": plain_phrase(kind, many=True)}, str(number)


def _exists(scene: Scene, dice: Dice) -> Asked | None:
    kind = some_kind(dice.choice(scene.objects), dice)
    exists = dice.chance(0.5)
    if not exists:
        kind = dice.choice(absent_kinds(scene, kind))
    return {"a": with_article(plain_phrase(kind))}, _yes(exists)


def _relation(scene: Scene, dice: Dice) -> Asked | None:
    """Whether one object is on that side of another, or in truth on the opposite one."""
    known = _unique(scene, dice, _by_any)
    related = [(x, y) for x in known for y in known if relations(x[0], y[0])]
    if not related:
        return None
    (first, a), (second, b) = related[0]
    side = dice.choice(sorted(relations(first, second)))
    is_so = dice.chance(0.5)
    words = {"left": "left of", "right": "right of"}
    asked = side if is_so else OPPOSITES[side]
    return {"a": plain_phrase(a), "b": plain_phrase(b), "rel": words.get(asked, asked)}, _yes(is_so)


def _larger(scene: Scene, dice: Dice) -> Asked | None:
    known = _unique(scene, dice, _by_any)
    pairs = [(x, y) for x in known for y in known if SIZES.index(x[0].size) > SIZES.index(y[0].size)]
    if not pairs:
        return None
    large, small = (plain_phrase(kind) for _, kind in pairs[0])
    is_so = dice.chance(0.5)
    return {"a": large if is_so else small, "b": small if is_so else large}, _yes(is_so)


def _more(scene: Scene, dice: Dice) -> Asked | None:
    """Two colours or two shapes, both there, of different number."""
    by_colour = dice.chance(0.5)
    kinds = dict.fromkeys(Kind(colour=o.colour) if by_colour else Kind(o.shape) for o in dice.shuffled(scene.objects))
    pairs = [(k, m) for k in kinds for m in kinds if k.count(scene) > m.count(scene)]
    if not pairs:
        return None
    more, less = (plain_phrase(kind, many=True) for kind in pairs[0])
    order, is_so = dice.choice(("more", "fewer")), dice.chance(0.5)
    ks, ls = (more, less) if (order == "more") == is_so else (less, more)
    return {"order": order, "ks": ks, "ls": ls}, _yes(is_so)


def _alike(attribute: Literal["colour", "size"]) -> Asker:
    """Whether two objects share it; asked where the scene has both two that do and two that don't."""

    def ask(scene: Scene, dice: Dice) -> Asked | None:
        known = _unique(scene, dice, _by_shape)
        pairs = [(x, y) for x in known for y in known if x is not y]
        same = [pair for pair in pairs if getattr(pair[0][0], attribute) == getattr(pair[1][0], attribute)]
        if not same or len(same) == len(pairs):
            return None
        is_so = dice.chance(0.5)
        first, second = dice.choice(same if is_so else [pair for pair in pairs if pair not in same])
        return {"a": plain_phrase(first[1]), "b": plain_phrase(second[1])}, _yes(is_so)

    return ask


QUESTION_TYPES = (
    QuestionType("colour", "other", _colour, ("what colour is the {a}?", "which colour does the {a} have?"), 4),
    QuestionType("shape", "other", _shape, ("what shape is the {colour} thing?", "which shape is {colour}?"), 3),
    QuestionType("size", "other", _size, ("what size is the {a}?", "how large is the {a}?"), 2),
    QuestionType("place", "other", _place, ("where is the {a}?", "where in the picture is the {a}?"), 2),
    QuestionType(
        "texture", "other", _texture, ("what is the background like?", "what pattern does the background have?"), 2
    ),
    QuestionType("total", "number", _total, ("how many shapes are there?", "how many things are in the picture?"), 2),
    QuestionType("count", "number", _count, ("how many {ks} are there?", "how many {ks} does the picture show?"), 3),
    QuestionType("exists", "yes/no", _exists, ("is there {a}?", "does the picture show {a}?"), 4),
    QuestionType("ground", "yes/no", _is_texture, ("is the background {texture}?", "is this a {texture} background?")),
    QuestionType("relation", "yes/no", _relation, ("is the {a} {rel} the {b}?", "does the {a} lie {rel} the {b}?"), 2),
    QuestionType("larger", "yes/no", _larger, ("is the {a} larger than the {b}?",)),
    QuestionType(
        "more", "yes/no", _more, ("are there {order} {ks} than {ls}?", "does it show {order} {ks} than {ls}?")
    ),
    QuestionType("same colour", "yes/no", _alike("colour"), ("do the {a} and the {b} have the same colour?",), 2),
    QuestionType("same size", "yes/no", _alike("size"), ("do the {a} and the {b} have the same size?",), 2),
)
"""All that is asked, and how."""


def make_question(scene: Scene, dice: Dice) -> Question:
    """A question about the scene: of the types that it offers one, by weight, in one of its wordings."""
    tries = [sort for sort in QUESTION_TYPES for _ in range(sort.weight)]
    for sort in dice.shuffled(tries):
        asked = sort.ask(scene, dice)
        if asked is not None:
            slots, answer = asked
            return Question(dice.choice(sort.templates).format(**slots), answer, sort.answer_type, sort.name)
    raise AssertionError("the number of shapes can always be asked for")
