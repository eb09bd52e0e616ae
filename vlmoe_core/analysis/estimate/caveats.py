"""What an estimate leaves out, or takes to be otherwise than it is: said beside the figures."""

from collections.abc import Iterator

from vlmoe_core.analysis.estimate.fake import Device
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.tasks.task import open_task


def not_counted(recipe: Recipe, device: Device) -> Iterator[str]:
    """A line for each thing that no figure holds."""
    yield "memory: buffers of communication, other than DistributedDataParallel's buckets"
    yield "memory: what the allocator loses to fragments"
    if device == "gpu":
        yield "memory: the CUDA context and the work space of its libraries (about a gigabyte)"
    yield "memory and time: the data loader, held-out evaluation, checkpoints"
    yield from _tokens(recipe)
    if recipe.task is not None and open_task(recipe.task).known_labels != NO_LABELS:
        yield "the loss on the labels, which come from the data, and the mixing of pictures (mixup, cutmix)"


def _tokens(recipe: Recipe) -> Iterator[str]:
    """Frozen models that run beside the one that is trained."""
    visual, objective = recipe.tokenizers.visual, recipe.objective
    if objective is None or not recipe.batch.micro.image + recipe.batch.micro.pair:
        return
    if not objective.hides:
        yield "the teacher of the visual tokenizer, and the distances to its codes"
    elif visual.tokens is None:
        yield f"the visual tokenizer ({visual.kind}), which makes the codes of each step's images"


def modelled_otherwise(recipe: Recipe, device: Device, labels: int | None) -> Iterator[str]:
    """A line for each thing that the figures take to be otherwise than in the run, or that they assume."""
    if labels is not None:
        yield f"the head has {labels:,} labels: the data, which was not read, may have more or fewer (--labels)"
    yield "texts are of the greatest length: shorter ones need less"
    pools = recipe.model.pools
    if pools:
        yield "each token of a sparse layer is computed, dropped ones too, and experts get equal shares"
    for pool, moe in pools.items():
        if moe.experts != "grouped":
            yield f"moe.{pool}.experts is {moe.experts}: memory as with grouped"
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
