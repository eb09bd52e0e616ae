"""Pictures with a class: one large object, whose shape is the class, among smaller ones of other shapes."""

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.world import (
    HELD_OUT,
    PAIRS,
    SEEN_PAIRS,
    SHAPES,
    TEXTURES,
    TONES,
    Combinations,
    Ground,
    Scene,
    Split,
    place_objects,
)

CLASSES = SHAPES
"""The ten classes."""
MOST_OTHERS = 3
"""Most objects beside the large one."""


def make_class_scene(split: Split, seed: int, number: int, combinations: Combinations = "seen") -> Scene:
    """The scene of that number. `heldout`: the large object is of a held-out pair; `seen`: none is."""
    dice = Dice(f"scenes/{split}/{seed}/{number}/class")
    label = dice.choice(CLASSES)
    pairs = SEEN_PAIRS if combinations == "seen" else PAIRS
    main = dice.choice(
        [pair for pair in (sorted(HELD_OUT) if combinations == "heldout" else pairs) if pair[1] == label]
    )
    others = [dice.choice([pair for pair in pairs if pair[1] != label]) for _ in range(dice.below(MOST_OTHERS + 1))]
    ground = Ground(dice.choice(TEXTURES), dice.choice(TONES), dice.below(2**16))
    while True:
        sizes = [dice.choice(("small", "medium")) for _ in others]
        placed = place_objects(dice, [(main, "large"), *zip(others, sizes, strict=True)])
        if placed is not None:
            return Scene(tuple(placed), ground)


def class_of(scene: Scene) -> str:
    """The shape of the large object."""
    (main,) = scene.select(size="large")
    return main.shape
