"""The processes of a run, imitated one at a time in this one: torch's fake process group, which sends nothing.

A collective of that group has the shapes of a real one; what it says that the others sent is what this one sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.mesh import ALONE, Mesh, check_processes, open_mesh


@contextmanager
def imitated(recipe: Recipe, world: int, rank: int = 0) -> Iterator[Mesh]:
    """Inside, this process is one of `world`, arranged as the recipe says; with `world` 1 it stays alone."""
    if world == 1:
        yield ALONE
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield open_mesh(recipe.parallel, "cpu")
    finally:
        dist.destroy_process_group()


def check_world(recipe: Recipe, world: int) -> None:
    """Whether so many processes can be imitated that train a recipe together.

    Raises:
        UsageError: this process is one of several itself.
        RecipeError: see `check_processes`.
    """
    if dist.is_available() and dist.is_initialized():
        raise UsageError("one process imitates all others here; start it without a launcher")
    check_processes(recipe, world)
