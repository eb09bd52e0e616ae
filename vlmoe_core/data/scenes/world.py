"""The world of scenes: coloured shapes on a textured ground, decided by (split, seed, index) alone.

Lengths are whole numbers in units of 1/1024 of the picture's side, x to the right and y down, so that a scene is the
same at every image size and on every machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vlmoe_core.data.scenes.dice import Dice

Split = Literal["train", "eval", "test"]
Combinations = Literal["seen", "heldout", "all"]

SIDE = 1024
"""Units along one side of the picture."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "hexagon", "heart", "ring", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RADII: Mapping[str, int] = {"small": 112, "medium": 164, "large": 236}
"""Sizes, from small to large."""
SIZES = tuple(RADII)
TEXTURES = ("plain", "striped", "checkered", "dotted", "shaded", "mottled")
TONES = ("grey", "sand", "sage", "mist", "mauve", "slate", "clay", "moss")
RELATIONS = ("left", "right", "above", "below")
OPPOSITES: Mapping[str, str] = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES = ("left", "right", "top", "bottom", "middle")
MAX_OBJECTS = 6

HELD_OUT = frozenset(
    {
        ("green", "circle"),
        ("pink", "square"),
        ("blue", "triangle"),
        ("purple", "star"),
        ("orange", "cross"),
        ("white", "diamond"),
        ("red", "hexagon"),
        ("brown", "heart"),
        ("black", "ring"),
        ("yellow", "crescent"),
    }
)
"""Colour-shape pairs that no training scene and no training text holds: every colour and every shape once."""
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
"""All (colour, shape)."""
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
"""Those that training may show."""

EXTENTS: Mapping[str, tuple[int, int, int, int]] = {
    "circle": (-920, -920, 920, 920),
    "square": (-820, -820, 820, 820),
    "triangle": (-980, -900, 980, 800),
    "star": (-951, -1000, 951, 809),
    "cross": (-950, -950, 950, 950),
    "diamond": (-700, -1000, 700, 1000),
    "hexagon": (-960, -831, 960, 831),
    "heart": (-910, -810, 910, 900),
    "ring": (-950, -950, 950, 950),
    "crescent": (-950, -950, 821, 950),
}
"""Left, top, right, bottom of each shape, in thousandths of its radius."""

_CLEAR = 112
"""Least distance along an axis for left, right, above or below to hold."""
_LOW, _HIGH = 360, 664
"""A centre up to the first is at the left or the top, from the second on at the right or the bottom."""


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene."""

    shape: str
    """One of SHAPES."""
    colour: str
    """One of COLOURS."""
    size: str
    """One of SIZES."""
    centre: tuple[int, int]
    """x and y in units."""

    @property
    def radius(self) -> int:
        """In units."""
        return RADII[self.size]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in units, rounded outwards."""
        x, y = self.centre
        left, top, right, bottom = EXTENTS[self.shape]
        return (
            x + left * self.radius // 1000,
            y + top * self.radius // 1000,
            x - -right * self.radius // 1000,
            y - -bottom * self.radius // 1000,
        )

    @property
    def places(self) -> frozenset[str]:
        """Those of PLACES where the centre clearly is."""
        x, y = self.centre
        tests = {"left": x <= _LOW, "right": x >= _HIGH, "top": y <= _LOW, "bottom": y >= _HIGH}
        places = frozenset(place for place, holds in tests.items() if holds)
        return places or frozenset({"middle"})

    def matches(self, shape: str | None = None, colour: str | None = None, size: str | None = None) -> bool:
        """True if the object is all that is asked for; None asks for nothing."""
        return shape in (None, self.shape) and colour in (None, self.colour) and size in (None, self.size)


def relation_holds(a: SceneObject, relation: str, b: SceneObject) -> bool:
    """True if `a` is clearly left of, right of, above or below `b`: far enough, and not mostly along the other axis."""
    dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    along, across = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= _CLEAR and 2 * along >= abs(across)


def relations(a: SceneObject, b: SceneObject) -> frozenset[str]:
    """All relations that hold from `a` to `b`; where neither one nor its opposite does, the picture leaves it open."""
    return frozenset(relation for relation in RELATIONS if relation_holds(a, relation, b))


@dataclass(frozen=True)
class Ground:
    """What the objects lie on."""

    texture: str
    """One of TEXTURES."""
    tone: str
    """One of TONES, the muted colour that the texture varies."""
    variant: int
    """Decides direction, period and offset of the texture: a whole number below 2^16."""


class Statement(Protocol):
    """Something that is true or false of a scene."""

    def holds(self, scene: "Scene") -> bool:
        """True if it is so."""
        ...


@dataclass(frozen=True)
class Scene:
    """Up to MAX_OBJECTS shapes, later ones on top of earlier ones, on a ground."""

    objects: tuple[SceneObject, ...]
    ground: Ground

    def select(
        self, shape: str | None = None, colour: str | None = None, size: str | None = None
    ) -> tuple[SceneObject, ...]:
        """The objects that are all that is asked for."""
        return tuple(o for o in self.objects if o.matches(shape, colour, size))

    def count(self, shape: str | None = None, colour: str | None = None, size: str | None = None) -> int:
        """How many objects are all that is asked for."""
        return len(self.select(shape, colour, size))

    def satisfies(self, statement: Statement) -> bool:
        """True if the statement holds here."""
        return statement.holds(self)

    def as_facts(self) -> dict[str, Any]:
        """The same as plain JSON values; `box` is added to each object."""
        objects = [
            {"shape": o.shape, "colour": o.colour, "size": o.size, "centre": list(o.centre), "box": list(o.box)}
            for o in self.objects
        ]
        ground = {"texture": self.ground.texture, "tone": self.ground.tone, "variant": self.ground.variant}
        return {"side": SIDE, "objects": objects, "ground": ground}


def scene_from_facts(facts: Mapping[str, Any]) -> Scene:
    """The scene that `as_facts` wrote."""
    objects = (
        SceneObject(o["shape"], o["colour"], o["size"], (o["centre"][0], o["centre"][1])) for o in facts["objects"]
    )
    return Scene(tuple(objects), Ground(**facts["ground"]))


def make_scene(
    split: Split, seed: int, index: int, combinations: Combinations = "seen", max_objects: int = MAX_OBJECTS
) -> Scene:
    """The scene of that number. `heldout` has at least one object of a held-out pair, `seen` none."""
    return sample_scene(Dice(f"scenes/{split}/{seed}/{index}"), combinations, max_objects)


def sample_scene(dice: Dice, combinations: Combinations, max_objects: int = MAX_OBJECTS) -> Scene:
    """A scene drawn with these dice. Placement starts again, with new sizes, until all objects fit."""
    looks = _looks(dice, dice.between(1, max_objects), combinations)
    same_size = dice.choice(SIZES) if dice.chance(0.15) else None
    ground = Ground(dice.choice(TEXTURES), dice.choice(TONES), dice.below(2**16))
    while True:
        sizes = [same_size if same_size and len(looks) <= 4 else dice.choice(SIZES) for _ in looks]
        placed = place_objects(dice, [(look, size) for look, size in zip(looks, sizes, strict=True)])
        if placed is not None:
            return Scene(tuple(placed), ground)


def _looks(dice: Dice, count: int, combinations: Combinations) -> list[tuple[str, str]]:
    """(colour, shape) of each object. Now and then they share one, so that `two circles` or `all red` come true."""
    pairs: Sequence[tuple[str, str]] = SEEN_PAIRS if combinations == "seen" else PAIRS
    looks = [dice.choice(sorted(HELD_OUT) if combinations == "heldout" else pairs)]
    theme = dice.choice(("colour", "shape", "none", "none", "none", "none", "none"))
    while len(looks) < count:
        fitting = pairs
        if theme == "colour" or dice.chance(0.15):
            fitting = [pair for pair in fitting if pair[0] == looks[-1][0]]
        elif theme == "shape" or dice.chance(0.15):
            fitting = [pair for pair in fitting if pair[1] == looks[-1][1]]
        looks.append(dice.choice(fitting))
    return looks


def place_objects(dice: Dice, things: Iterable[tuple[tuple[str, str], str]]) -> list[SceneObject] | None:
    """Objects of these ((colour, shape), size), the largest first and so at the bottom; None if one finds no place."""
    placed: list[SceneObject] = []
    discs: list[tuple[int, int, int]] = []
    for (colour, shape), size in sorted(things, key=lambda thing: -RADII[thing[1]]):
        centre = _free_centre(dice, RADII[size], discs)
        if centre is None:
            return None
        discs.append((*centre, RADII[size]))
        placed.append(SceneObject(shape, colour, size, centre))
    return placed


def _free_centre(dice: Dice, radius: int, discs: Iterable[tuple[int, int, int]]) -> tuple[int, int] | None:
    """Where a disc sinks into none of the others (x, y, no smaller radius) by more than a quarter of its radius.

    None after 20 tries.
    """
    margin = radius + 8
    for _ in range(20):
        x, y = dice.between(margin, SIDE - margin), dice.between(margin, SIDE - margin)
        for other_x, other_y, other_radius in discs:
            reach = radius + other_radius - radius // 4
            if (x - other_x) ** 2 + (y - other_y) ** 2 < reach * reach:
                break
        else:
            return x, y
    return None
