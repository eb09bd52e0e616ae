"""Strong and weak scaling of two models, from one node to hundreds: what docs/SCALING.md shows.

`docs/plot_scaling.py` draws them and prints their tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlmoe_core.analysis.scaling.machine import Machine
from vlmoe_core.analysis.scaling.plan import Step, best, layouts, predict
from vlmoe_core.analysis.scaling.work import work_of
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.train.config import StreamCounts

Scaling = Literal["strong", "weak"]
WORLDS = tuple(8 * 2**i for i in range(10))
"""8 to 4,096 devices."""
BASE, LARGE = "base-32e", "100 x"
MODELS: dict[str, tuple[str, ...]] = {
    BASE: (),
    LARGE: (
        "model.layers=28",
        "model.dim=2560",
        "model.heads=20",
        "model.hidden=10240",
        "model.moe.vision.num_experts=128",
        "model.moe.text.num_experts=128",
        "batch.size.image=8192",
        "batch.size.text=8192",
        "batch.size.pair=8192",
        "batch.micro.image=16",
        "batch.micro.text=16",
        "batch.micro.pair=16",
    ),
}
"""What each changes in the recipe paper/base-32e."""


@dataclass(frozen=True)
class Point:
    """A recipe on so many devices."""

    world: int
    """Devices."""
    micro: int
    """Examples of each stream in a micro-batch."""
    micros: int
    """Micro-batches of a device in a step."""
    size: int
    """Examples of each stream in a step, over all devices."""
    checkpointed: bool
    """Whether activations are recomputed."""
    step: Step | None
    """null: a step has fewer examples of a stream than there are devices."""

    @property
    def bound(self) -> str:
        """What bounds it."""
        return "batch" if self.step is None else self.step.bound

    @property
    def runs(self) -> bool:
        """Whether it can run at all."""
        return self.step is not None and self.step.fits


def recipe_of(model: str) -> Recipe:
    """The recipe of one of `MODELS`."""
    return load_recipe("paper/base-32e", MODELS[model]).recipe


def curve(model: str, scaling: Scaling, machine: Machine, worlds: Sequence[int] = WORLDS) -> list[Point]:
    """A point for each number of devices.

    strong: the recipe's step, its micro-batches made smaller where there are more devices than they. weak: each device
    computes one micro-batch of the recipe, so that a step grows with the devices.
    """
    recipe = recipe_of(model)
    return [_point(recipe, scaling, world, machine) for world in worlds]


def _point(recipe: Recipe, scaling: Scaling, world: int, machine: Machine) -> Point:
    size, micro = recipe.batch.size.image, recipe.batch.micro.image
    if scaling == "weak":
        size = micro * world
    micro = min(micro, size // world)
    if micro == 0:
        return Point(world, 0, 0, size, False, None)
    micros = size // (micro * world)
    found = [(on, best(_steps(recipe, micro, micros, world, on, machine))) for on in (False, True)]
    step = best([step for _, step in found])
    return Point(world, micro, micros, size, next(on for on, one in found if one is step), step)


def _steps(recipe: Recipe, micro: int, micros: int, world: int, checkpointed: bool, machine: Machine) -> list[Step]:
    counts = StreamCounts(image=micro, text=micro, pair=micro)
    batch = recipe.batch.model_copy(update={"micro": counts})
    train = recipe.train.model_copy(update={"activation_checkpointing": checkpointed})
    work = work_of(recipe.model_copy(update={"batch": batch, "train": train}))
    return [predict(work, micros, layout, machine) for layout in layouts(work, world)]
