"""The processes of a run, imitated one at a time in this one: torch's fake process group, which sends nothing.

A collective of that group has the shapes of a real one; what it says that the others sent is what this one sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.mesh import ALONE, Mesh, check_mesh, open_mesh


@contextmanager
def imitated(recipe: Recipe, world: int, rank: int = 0) -> Iterator[Mesh]:
    """Inside, this process is one of `world`, arranged as the recipe says; with `world` 1 it stays alone."""
    if world == 1:
        yield ALONE
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield open_mesh(recipe.parallel, recipe.model, "cpu")
    finally:
        dist.destroy_process_group()


def check_world(recipe: Recipe, world: int) -> None:
    """Whether so many processes can train a recipe together.

    Raises:
        UsageError: they can't share a step's micro-batches, or this process is one of several itself.
        RecipeError: they can't share the experts as `parallel` says.
    """
    if dist.is_available() and dist.is_initialized():
        raise UsageError("one process imitates all others here; start it without a launcher")
    micros = recipe.batch.num_micro
    fits = [n for n in range(1, micros + 1) if micros % n == 0]
    aim = recipe.objective if recipe.task is None else open_task(recipe.task)
    if aim is not None and aim.needs_whole_batch:
        fits = [micros]
    if world not in fits:
        raise UsageError(
            f"{micros} micro-batches a step (batch.size / batch.micro) can't be dealt to {world} processes; these "
            f"numbers of processes fit: {', '.join(map(str, fits))}; or change batch.micro"
        )
    check_mesh(recipe.parallel, recipe.model, world)
