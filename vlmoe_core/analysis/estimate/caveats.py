"""What an estimate leaves out, or takes to be otherwise than it is: said beside the figures."""

from collections.abc import Iterator

from vlmoe_core.analysis.estimate.fake import Device
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.tasks.task import open_task


def not_counted(recipe: Recipe, device: Device, world: int = 1) -> Iterator[str]:
    """A line for each thing that no figure holds, on so many devices."""
    if world > 1:
        yield "memory: buffers that the library of communication keeps for itself"
        yield "time: what devices wait for each other (docs/SCALING.md)"
    yield "memory: what the allocator loses to fragments"
    if device == "gpu":
        yield "memory: the CUDA context and the work space of its libraries (about a gigabyte)"
    yield "memory and time: the data loader, held-out evaluation, checkpoints"
    yield from _tokens(recipe)
    if recipe.task is not None and open_task(recipe.task).known_labels != NO_LABELS:
        yield "the loss on the labels, which come from the data, and the mixing of pictures (mixup, cutmix)"


def _shared(recipe: Recipe, world: int | None) -> Iterator[str]:
    """How devices share a model."""
    parallel = recipe.parallel
    if world is None and (parallel.expert > 1 or parallel.shard == "full"):
        yield (
            f"one device holds everything; the recipe shares it (parallel.expert {parallel.expert}, shard "
            f"{parallel.shard}): say of how many devices with --world N"
        )
    if world is None or world == 1:
        return
    if _travels(recipe, world):
        yield "all experts get the same; at worst tokens choose experts of one device, as long as these have places"
    if parallel.shard == "full":
        yield "memory: fully_shard gathers and frees weights in the order of a CPU, without streams"


def _travels(recipe: Recipe, world: int | None) -> bool:
    """Whether tokens go to other devices."""
    return world is not None and world > 1 and recipe.parallel.expert > 1


def _tokens(recipe: Recipe) -> Iterator[str]:
    """Frozen models that run beside the one that is trained."""
    visual, objective = recipe.tokenizers.visual, recipe.objective
    if objective is None or not recipe.batch.micro.image + recipe.batch.micro.pair:
        return
    if not objective.hides:
        yield "the teacher of the visual tokenizer, and the distances to its codes"
    elif visual.tokens is None:
        yield f"the visual tokenizer ({visual.kind}), which makes the codes of each step's images"


def modelled_otherwise(recipe: Recipe, device: Device, labels: int | None, world: int | None = None) -> Iterator[str]:
    """A line for each thing that the figures take to be otherwise than in the run, or that they assume.

    Args:
        recipe: the run.
        device: kind of device.
        labels: labels that the head was taken to have; null: the data don't decide on them.
        world: number of devices; null: nobody said it.
    """
    yield from _shared(recipe, world)
    if labels is not None:
        yield f"the head has {labels:,} labels: the data, which was not read, may have more or fewer (--labels)"
    yield "texts are of the greatest length: shorter ones need less"
    pools = recipe.model.pools
    if pools:
        yield "each token of a sparse layer is computed, dropped ones too, and experts get equal shares"
    for pool, moe in pools.items():
        if moe.experts != "grouped":
            empty = moe.experts == "tutel" and _travels(recipe, world)
            sent = " and what is sent (tutel sends empty places too)" if empty else ""
            yield f"moe.{pool}.experts is {moe.experts}: memory{sent} as with grouped"
    if device == "gpu":
        yield "memory: attention by a fused kernel, which keeps no L x L"
    if device == "gpu" and pools and recipe.train.precision == "bf16":
        yield "memory: experts by torch's grouped kernel, which needs a Hopper or Blackwell GPU"
    if device == "gpu" and recipe.train.precision != "fp32":
        yield "memory: autocast lowers what it lowers on a CPU"
    if device == "gpu" and recipe.model.positions != "absolute":
        yield "memory: relative positions keep matrices of L x L, which a GPU's fused kernel may not"
    if recipe.train.compile:
        yield "memory: train.compile changes what is kept; it is estimated without"
