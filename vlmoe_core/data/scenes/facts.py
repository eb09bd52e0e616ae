"""What can be said of a scene, as data: statements that are true or false of it, and their form in JSON.

Statements speak of kinds of objects and mean "there are such objects": `Related(red, left, blue)` holds if some red
object is left of some blue one. Objects that one statement names are always different objects.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import permutations
from typing import Any, Literal

from vlmoe_core.data.scenes.world import SIZES, Scene, SceneObject, Statement, relation_holds


@dataclass(frozen=True)
class Kind:
    """A description that objects fit; None leaves an attribute open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None

    def fits(self, thing: SceneObject) -> bool:
        """True if the object is of this kind."""
        return thing.matches(self.shape, self.colour, self.size)

    def count(self, scene: Scene) -> int:
        """Objects of this kind in the scene."""
        return scene.count(self.shape, self.colour, self.size)


def _pairs(scene: Scene, a: Kind, b: Kind) -> Iterator[tuple[SceneObject, SceneObject]]:
    """All pairs of different objects of which the first fits a and the second b."""
    return ((x, y) for x, y in permutations(scene.objects, 2) if a.fits(x) and b.fits(y))


@dataclass(frozen=True)
class Present:
    """There are different objects, one of each kind."""

    kinds: tuple[Kind, ...]

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        choices = permutations(scene.objects, len(self.kinds))
        return any(all(k.fits(x) for k, x in zip(self.kinds, choice, strict=True)) for choice in choices)


@dataclass(frozen=True)
class Count:
    """There are exactly so many objects of the kind."""

    kind: Kind
    number: int

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return self.kind.count(scene) == self.number


@dataclass(frozen=True)
class Compare:
    """There are more, fewer or as many objects of kind a than of kind b."""

    a: Kind
    order: Literal["more", "fewer", "equal"]
    b: Kind

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        a, b = self.a.count(scene), self.b.count(scene)
        return {"more": a > b, "fewer": a < b, "equal": a == b}[self.order]


@dataclass(frozen=True)
class Every:
    """There are objects, and all are of the kind."""

    kind: Kind

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return self.kind.count(scene) == len(scene.objects) > 0


@dataclass(frozen=True)
class Related:
    """Some a is left of, right of, above or below some b."""

    a: Kind
    relation: str
    b: Kind

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return any(relation_holds(x, self.relation, y) for x, y in _pairs(scene, self.a, self.b))


@dataclass(frozen=True)
class Placed:
    """Some object of the kind stands in all these places (a corner is two of them)."""

    kind: Kind
    places: tuple[str, ...]

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return any(self.kind.fits(x) and x.places.issuperset(self.places) for x in scene.objects)


@dataclass(frozen=True)
class Larger:
    """Some a is larger than some b."""

    a: Kind
    b: Kind

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return any(SIZES.index(x.size) > SIZES.index(y.size) for x, y in _pairs(scene, self.a, self.b))


@dataclass(frozen=True)
class Alike:
    """Some a and some b are the same, or are not, in shape, colour or size."""

    a: Kind
    b: Kind
    attribute: Literal["shape", "colour", "size"]
    same: bool = True

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        pairs = _pairs(scene, self.a, self.b)
        return any((getattr(x, self.attribute) == getattr(y, self.attribute)) == self.same for x, y in pairs)


@dataclass(frozen=True)
class OnGround:
    """The ground has this texture."""

    texture: str

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return scene.ground.texture == self.texture


@dataclass(frozen=True)
class Both:
    """All parts hold, each for itself."""

    parts: tuple[Statement, ...]

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return all(part.holds(scene) for part in self.parts)


@dataclass(frozen=True)
class Untrue:
    """The part does not hold."""

    part: Statement

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return not self.part.holds(scene)


@dataclass(frozen=True)
class Caption:
    """A sentence about a scene, and what it says."""

    text: str
    meaning: Statement


_FORMS = {
    form.__name__.lower(): form
    for form in (Present, Count, Compare, Every, Related, Placed, Larger, Alike, OnGround, Both, Untrue)
}


def statement_facts(statement: Statement) -> dict[str, Any]:
    """The statement as plain JSON values: `says` names its class in lower case, the other entries are its fields."""
    values = {f.name: getattr(statement, f.name) for f in fields(statement)}  # type: ignore[arg-type]
    return {"says": type(statement).__name__.lower()} | {name: _plain(value) for name, value in values.items()}


def statement_from_facts(facts: Mapping[str, Any]) -> Statement:
    """The statement that `statement_facts` wrote."""
    form = _FORMS[facts["says"]]
    values: dict[str, Any] = {name: _parsed(value) for name, value in facts.items() if name != "says"}
    return form(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Kind):
        return {name: word for name, word in asdict(value).items() if word is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return statement_facts(value) if type(value) in _FORMS.values() else value


def _parsed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return statement_from_facts(value) if "says" in value else Kind(**value)
    return tuple(_parsed(item) for item in value) if isinstance(value, list) else value
