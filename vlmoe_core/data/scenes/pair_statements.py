"""What can be said of two pictures: statements that are true or false of them."""

from dataclasses import dataclass
from typing import Literal, Protocol

from vlmoe_core.data.scenes.facts import Kind
from vlmoe_core.data.scenes.ground import is_dark
from vlmoe_core.data.scenes.world import SIZES, Scene, Statement

Pair = tuple[Scene, Scene]
"""The left and the right picture."""


class PairStatement(Protocol):
    """Something that is true or false of two pictures."""

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        ...


@dataclass(frozen=True)
class OnSide:
    """The part holds in the left (0) or the right (1) picture; `only`: and not in the other."""

    side: int
    part: Statement
    only: bool = False

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return self.part.holds(pair[self.side]) and not (self.only and self.part.holds(pair[1 - self.side]))


@dataclass(frozen=True)
class InPictures:
    """The part holds in exactly so many of the two pictures."""

    number: int
    part: Statement

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return sum(self.part.holds(scene) for scene in pair) == self.number


@dataclass(frozen=True)
class SidesCompare:
    """The left picture has more, fewer or as many objects of the kind than the right one."""

    kind: Kind
    order: Literal["more", "fewer", "equal"]

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        left, right = (self.kind.count(scene) for scene in pair)
        return {"more": left > right, "fewer": left < right, "equal": left == right}[self.order]


@dataclass(frozen=True)
class Together:
    """Both pictures together have exactly so many objects of the kind."""

    kind: Kind
    number: int

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return sum(self.kind.count(scene) for scene in pair) == self.number


@dataclass(frozen=True)
class GroundsAlike:
    """Both grounds have the same texture, or they differ."""

    same: bool

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return (pair[0].ground.texture == pair[1].ground.texture) == self.same


@dataclass(frozen=True)
class DarkGround:
    """The ground of a picture is dark, or it is light."""

    dark: bool

    def holds(self, scene: Scene) -> bool:
        """True if it is so."""
        return is_dark(scene.ground) == self.dark


@dataclass(frozen=True)
class DarkerGround:
    """The ground of that side is the darker one: it is dark, and that of the other side is light."""

    side: int

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        return is_dark(pair[self.side].ground) and not is_dark(pair[1 - self.side].ground)


@dataclass(frozen=True)
class LargestShape:
    """The largest object of both pictures is on that side alone."""

    side: int

    def holds(self, pair: Pair) -> bool:
        """True if it is so."""
        here, there = (max(SIZES.index(o.size) for o in pair[side].objects) for side in (self.side, 1 - self.side))
        return here > there
