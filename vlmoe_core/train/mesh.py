"""The processes of a run as a grid: replicas of the data x processes that share the experts."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vlmoe_core.errors import RecipeError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.share import Share
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The place of this process among all; ranks stand row by row: rank = data_rank * expert + expert_rank."""

    expert: int
    """Processes that share the experts of each layer."""
    data: int
    """Replicas of each share."""
    shard: Literal["none", "full"]
    """Whether weights are cut over all processes."""
    expert_rank: int = 0
    """Which share this process holds."""
    data_rank: int = 0
    """Which replica of it."""
    grid: DeviceMesh | None = None
    """(data, expert); null: one process."""
    world: DeviceMesh | None = None
    """All processes in one row; null: one process."""

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.data * self.expert

    def share(self, total: int) -> Share:
        """The experts that this process holds of a layer's `total`."""
        count = total // self.expert
        return Share(self.expert_rank * count, count, total)


ALONE = Mesh(1, 1, "none")
"""One process."""


def open_mesh(config: ParallelConfig, device_type: str) -> Mesh:
    """Arrange the processes that there are, so many as `check_processes` takes. All of them call it."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return ALONE
    data, expert = ranks // config.expert, config.expert
    grid = init_device_mesh(device_type, (data, expert), mesh_dim_names=("data", "expert"))
    world = init_device_mesh(device_type, (ranks,), mesh_dim_names=("world",))
    data_rank, expert_rank = divmod(dist.get_rank(), expert)
    return Mesh(expert, data, config.shard, expert_rank, data_rank, grid, world)


def check_processes(recipe: Recipe, ranks: int) -> None:
    """Whether so many processes can train a recipe together.

    Raises:
        RecipeError: they can't share the micro-batches of a step, or the experts as `parallel` says.
    """
    micros = recipe.batch.num_micro
    if micros % ranks:
        fits = [n for n in range(1, micros + 1) if micros % n == 0]
        raise RecipeError(
            f"{micros} micro-batches a step (batch.size / batch.micro) can't be dealt to {ranks} processes; these "
            f"numbers of processes fit: {', '.join(map(str, fits))}; or change batch.micro"
        )
    aim = open_task(recipe.task) if recipe.task else recipe.objective
    if aim is not None and aim.needs_whole_batch and micros != ranks:
        raise RecipeError(
            f"image-text contrast compares all examples of a step, which {micros} micro-batches on {ranks} processes "
            f"would cut into parts; set batch.micro so that size / micro is {ranks}"
        )
    check_mesh(recipe.parallel, recipe.model, ranks)


def check_mesh(config: ParallelConfig, model: ModelConfig, ranks: int) -> None:
    """Raises RecipeError where `parallel.expert` divides not the processes, or not the experts of a layer."""
    if config.expert == 1:
        return
    if not (experts := _experts(model)):
        raise RecipeError(f"parallel.expert is {config.expert}, but the model has no sparse layer; set it to 1")
    fits = [n for n in range(1, ranks + 1) if all(number % n == 0 for number in (ranks, *experts))]
    if config.expert not in fits:
        raise RecipeError(
            f"parallel.expert is {config.expert}, which must divide the number of processes ({ranks}) and of the "
            f"experts of each layer ({', '.join(map(str, sorted(experts)))}); these sizes fit: "
            f"{', '.join(map(str, fits))}; or start another number of processes"
        )


def _experts(model: ModelConfig) -> set[int]:
    """How many experts the sparse layers have."""
    return {moe.num_kept(layer) for pool, moe in model.pools.items() for layer in model.sparse_layers(pool)}
