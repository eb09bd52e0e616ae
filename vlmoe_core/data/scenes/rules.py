"""What captions say: rules that look for one sort of truth in a scene.

A rule returns the words for the slots of its templates and what the sentence then means, or None if the scene offers
nothing of that sort. Slots: a, b, c with the article `a`; the_a, the_b, the_c with `the`, of objects that the words fit
alone; k a noun alone; ks, ls plurals; the rest as named.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import (
    Alike,
    Both,
    Compare,
    Count,
    Every,
    Kind,
    Larger,
    OnGround,
    Placed,
    Present,
    Related,
    Untrue,
)
from vlmoe_core.data.scenes.words import (
    COLOUR_WORDS,
    NUMBERS,
    PLACE_WORDS,
    RELATION_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
    noun_phrase,
    with_article,
)
from vlmoe_core.data.scenes.world import COLOURS, SHAPES, SIZES, Scene, SceneObject, Statement, relations

Attribute = Literal["shape", "colour", "size"]
Slots = Mapping[str, str]
Filled = tuple[Slots, Statement]
Rule = Callable[[Scene, Dice], Filled | None]
Known = tuple[SceneObject, Kind, str]
"""An object that can be told from all others, a kind that only it is of, and words for it with `the`."""


def _kind(thing: SceneObject, dice: Dice) -> Kind:
    """Some true description of the object, most often colour and shape."""
    size = thing.size if dice.chance(0.35) else None
    spare = dice.below(10)
    return Kind(None if spare == 0 else thing.shape, None if spare == 1 else thing.colour, size)


def _unique_kind(scene: Scene, thing: SceneObject, dice: Dice) -> Kind | None:
    """A description that fits this object alone, or None where even all its attributes fit others."""
    fuller = Kind(thing.shape, thing.colour, thing.size)
    for kind in (_kind(thing, dice), Kind(thing.shape, thing.colour), fuller):
        if kind.count(scene) == 1:
            return kind
    return None


def _some(scene: Scene, dice: Dice, number: int) -> tuple[Slots, tuple[Kind, ...]] | None:
    """Slots a, b, c and kinds of so many different objects."""
    if len(scene.objects) < number:
        return None
    kinds = tuple(_kind(thing, dice) for thing in dice.shuffled(scene.objects)[:number])
    names = zip("abc", kinds, strict=False)
    return {name: with_article(noun_phrase(kind, dice)) for name, kind in names}, kinds


def _known(scene: Scene, dice: Dice) -> list[Known]:
    """All objects that can be told from all others, in random order."""
    kinds = [(thing, _unique_kind(scene, thing, dice)) for thing in dice.shuffled(scene.objects)]
    return [(thing, kind, "the " + noun_phrase(kind, dice)) for thing, kind in kinds if kind is not None]


def _known_without(attribute: Attribute, scene: Scene, dice: Dice) -> list[Known]:
    """All objects that shape and colour, less that attribute, tell from all others, in random order."""
    kinds = [
        (o, Kind(None if attribute == "shape" else o.shape, None if attribute == "colour" else o.colour))
        for o in dice.shuffled(scene.objects)
    ]
    return [(o, kind, "the " + noun_phrase(kind, dice)) for o, kind in kinds if kind.count(scene) == 1]


def _texture(scene: Scene, dice: Dice) -> str:
    return dice.mostly(TEXTURE_WORDS[scene.ground.texture])


def one(scene: Scene, dice: Dice) -> Filled | None:
    """Some object."""
    some = _some(scene, dice, 1)
    assert some is not None, "every scene has an object"
    return some[0], Present(some[1])


def one_on_ground(scene: Scene, dice: Dice) -> Filled | None:
    """Some object, and the texture of the ground."""
    some = _some(scene, dice, 1)
    assert some is not None, "every scene has an object"
    slots = {**some[0], "texture": _texture(scene, dice)}
    return slots, Both((Present(some[1]), OnGround(scene.ground.texture)))


def alone(scene: Scene, dice: Dice) -> Filled | None:
    """The only object of the scene."""
    if len(scene.objects) != 1:
        return None
    kind = _kind(scene.objects[0], dice)
    return {"a": with_article(noun_phrase(kind, dice))}, Both((Present((kind,)), Count(Kind(), 1)))


def several(number: int) -> Rule:
    """So many different objects."""

    def rule(scene: Scene, dice: Dice) -> Filled | None:
        some = _some(scene, dice, number)
        return None if some is None else (some[0], Present(some[1]))

    return rule


def relation(scene: Scene, dice: Dice) -> Filled | None:
    """Two objects of which one is clearly on one side of the other."""
    things = dice.shuffled(scene.objects)
    related = [(x, y) for x in things for y in things if x is not y and relations(x, y)]
    if not related:
        return None
    first, second = related[0]
    relation = dice.choice(sorted(relations(first, second)))
    a, b = _kind(first, dice), _kind(second, dice)
    slots = {"a": with_article(noun_phrase(a, dice)), "b": with_article(noun_phrase(b, dice))}
    return {**slots, "rel": _relation_words(relation, dice)}, Related(a, relation, b)


def known_relation(scene: Scene, dice: Dice) -> Filled | None:
    """The same of two objects that can be told from all others."""
    known = _known(scene, dice)
    related = [(x, y) for x in known for y in known if relations(x[0], y[0])]
    if not related:
        return None
    (first, a, the_a), (second, b, the_b) = related[0]
    relation = dice.choice(sorted(relations(first, second)))
    return {"the_a": the_a, "the_b": the_b, "rel": _relation_words(relation, dice)}, Related(a, relation, b)


def two_relations(scene: Scene, dice: Dice) -> Filled | None:
    """One object between relations to two others, all three told from the rest."""
    known = _known(scene, dice)
    for first, a, the_a in known:
        others = [other for other in known if relations(first, other[0])]
        if len(others) < 2:
            continue
        (second, b, the_b), (third, c, the_c) = others[:2]
        to_b, to_c = (dice.choice(sorted(relations(first, other))) for other in (second, third))
        slots = {"the_a": the_a, "the_b": the_b, "the_c": the_c}
        words = {"rel": _relation_words(to_b, dice), "rel_c": _relation_words(to_c, dice)}
        return {**slots, **words}, Both((Related(a, to_b, b), Related(a, to_c, c)))
    return None


def _relation_words(relation: str, dice: Dice) -> str:
    return dice.mostly(RELATION_WORDS[relation])


def place(scene: Scene, dice: Dice) -> Filled | None:
    """Some object, and where in the picture it is."""
    thing = dice.choice(scene.objects)
    kind = _kind(thing, dice)
    fitting = [places for places in PLACE_WORDS if thing.places.issuperset(places)]
    places = dice.mostly(sorted(fitting, key=lambda places: -len(places)))
    slots = {"a": with_article(noun_phrase(kind, dice)), "place": dice.mostly(PLACE_WORDS[places])}
    return slots, Placed(kind, places)


def total(scene: Scene, dice: Dice) -> Filled | None:
    """How many objects there are, if several."""
    number = len(scene.objects)
    if number < 2:
        return None
    return {"n": NUMBERS[number]}, Count(Kind(), number)


def total_on_ground(scene: Scene, dice: Dice) -> Filled | None:
    """The same, and the texture of the ground."""
    filled = total(scene, dice)
    if filled is None:
        return None
    slots, meaning = filled
    return {**slots, "texture": _texture(scene, dice)}, Both((meaning, OnGround(scene.ground.texture)))


def _one_attribute(thing: SceneObject, dice: Dice) -> Kind:
    """Its shape, its colour or both."""
    which = dice.below(3)
    return Kind(None if which == 0 else thing.shape, None if which == 1 else thing.colour)


def repeated(scene: Scene, dice: Dice) -> Filled | None:
    """How many objects are of a kind that at least two are of."""
    kinds = [_one_attribute(thing, dice) for thing in dice.shuffled(scene.objects)]
    kind = next((kind for kind in kinds if kind.count(scene) >= 2), None)
    if kind is None:
        return None
    number = kind.count(scene)
    return {"n": NUMBERS[number], "ks": noun_phrase(kind, dice, many=True)}, Count(kind, number)


def _absent_kind(scene: Scene, dice: Dice) -> Kind:
    colours = [colour for colour in COLOURS if scene.count(colour=colour) == 0]
    shapes = [shape for shape in SHAPES if scene.count(shape=shape) == 0]
    return Kind(colour=dice.choice(colours)) if dice.chance(0.5) else Kind(shape=dice.choice(shapes))


def absent(scene: Scene, dice: Dice) -> Filled | None:
    """An object that is there, and a colour or a shape that is not."""
    kind, absent = _kind(dice.choice(scene.objects), dice), _absent_kind(scene, dice)
    slots = {"a": with_article(noun_phrase(kind, dice)), "k": noun_phrase(absent, dice)}
    return slots, Both((Present((kind,)), Count(absent, 0)))


def absent_colour(scene: Scene, dice: Dice) -> Filled | None:
    """How many objects there are, if several, and a colour that none of them has."""
    colour = dice.choice([colour for colour in COLOURS if scene.count(colour=colour) == 0])
    words = {"colour_word": dice.mostly(COLOUR_WORDS[colour]), "n": NUMBERS[len(scene.objects)]}
    if len(scene.objects) < 2:
        return None
    return words, Both((Count(Kind(), len(scene.objects)), Count(Kind(colour=colour), 0)))


def comparison(scene: Scene, dice: Dice) -> Filled | None:
    """Two kinds of different number, both there."""
    by_colour = dice.chance(0.5)
    kinds = list(dict.fromkeys(Kind(colour=o.colour) if by_colour else Kind(shape=o.shape) for o in scene.objects))
    kinds = dice.shuffled(kinds)
    pairs = [(k, m) for k in kinds for m in kinds if k.count(scene) > m.count(scene)]
    if not pairs:
        return None
    more, less = pairs[0]
    order: Literal["more", "fewer"] = "more" if dice.chance(0.5) else "fewer"
    a, b = (more, less) if order == "more" else (less, more)
    slots = {"ks": noun_phrase(a, dice, many=True), "ls": noun_phrase(b, dice, many=True), "order": order}
    return slots, Compare(a, order, b)


def equal(scene: Scene, dice: Dice) -> Filled | None:
    """Two shapes of the same number."""
    kinds = [Kind(shape=shape) for shape in dice.shuffled(SHAPES) if scene.count(shape=shape)]
    pairs = [(k, m) for k in kinds for m in kinds if k is not m and k.count(scene) == m.count(scene)]
    if not pairs:
        return None
    a, b = pairs[0]
    slots = {"ks": noun_phrase(a, dice, many=True), "ls": noun_phrase(b, dice, many=True)}
    return slots, Compare(a, "equal", b)


def _shared(scene: Scene) -> list[Kind]:
    """What all objects have in common: kinds of one attribute."""
    first = scene.objects[0]
    kinds = [Kind(colour=first.colour), Kind(size=first.size), Kind(shape=first.shape)]
    return [kind for kind in kinds if kind.count(scene) == len(scene.objects)]


def all_are(scene: Scene, dice: Dice) -> Filled | None:
    """A colour or a size that all objects share."""
    shared = [kind for kind in _shared(scene) if kind.shape is None]
    if len(scene.objects) < 2 or not shared:
        return None
    kind = dice.choice(shared)
    words = COLOUR_WORDS[kind.colour] if kind.colour is not None else SIZE_WORDS[kind.size or ""]
    slots = {"n": NUMBERS[len(scene.objects)], "adjective": dice.mostly(words)}
    return slots, Both((Every(kind), Count(Kind(), len(scene.objects))))


def all_kind(scene: Scene, dice: Dice) -> Filled | None:
    """A shape, colour or size that all objects share."""
    shared = _shared(scene)
    if len(scene.objects) < 2 or not shared:
        return None
    kind = dice.choice(shared)
    slots = {"k": with_article(noun_phrase(kind, dice)), "ks": noun_phrase(kind, dice, many=True)}
    return slots, Every(kind)


def larger(scene: Scene, dice: Dice) -> Filled | None:
    """Two objects of different size, told from all others without their sizes."""
    known = _known_without("size", scene, dice)
    pairs = [(x, y) for x in known for y in known if SIZES.index(x[0].size) > SIZES.index(y[0].size)]
    if not pairs:
        return None
    (_, a, the_a), (_, b, the_b) = pairs[0]
    return {"the_a": the_a, "the_b": the_b}, Larger(a, b)


def alike(attribute: Attribute, same: bool) -> Rule:
    """Two objects that are alike, or not, in that attribute, told from all others without it."""

    def rule(scene: Scene, dice: Dice) -> Filled | None:
        known = _known_without(attribute, scene, dice)
        pairs = [(x, y) for x in known for y in known if x is not y]
        pairs = [(x, y) for x, y in pairs if (getattr(x[0], attribute) == getattr(y[0], attribute)) == same]
        if not pairs:
            return None
        (_, a, the_a), (_, b, the_b) = pairs[0]
        return {"the_a": the_a, "the_b": the_b}, Alike(a, b, attribute, same)

    return rule


def colour_of(scene: Scene, dice: Dice) -> Filled | None:
    """The colour of the only object of its shape."""
    known = _known_without("colour", scene, dice)
    if not known:
        return None
    thing, _, the_a = known[0]
    colour = dice.mostly(COLOUR_WORDS[thing.colour])
    return {"the_a": the_a, "colour_word": colour}, Present((Kind(thing.shape, thing.colour),))


def colour_not(scene: Scene, dice: Dice) -> Filled | None:
    """The colour of the only object of its shape, and a colour that it has not."""
    filled = colour_of(scene, dice)
    if filled is None:
        return None
    slots, meaning = filled
    assert isinstance(meaning, Present)
    (kind,) = meaning.kinds
    other = dice.choice([colour for colour in COLOURS if colour != kind.colour])
    is_not = Untrue(Present((Kind(kind.shape, other),)))
    return {**slots, "other": dice.mostly(COLOUR_WORDS[other])}, Both((meaning, is_not))


def shape_of(scene: Scene, dice: Dice) -> Filled | None:
    """The shape of the only object of its colour."""
    known = _known_without("shape", scene, dice)
    if not known:
        return None
    thing, _, the_a = known[0]
    shape = with_article(noun_phrase(Kind(thing.shape), dice))
    return {"the_a": the_a, "shape_word": shape}, Present((Kind(thing.shape, thing.colour),))


def size_of(scene: Scene, dice: Dice) -> Filled | None:
    """The size of an object that can be told from all others without it."""
    known = _known_without("size", scene, dice)
    if not known:
        return None
    thing, kind, the_a = known[0]
    size = dice.mostly(SIZE_WORDS[thing.size])
    return {"the_a": the_a, "size_word": size}, Present((Kind(kind.shape, kind.colour, thing.size),))
