"""Memory of one device in a training step: by formulas what is always there, by a step on fake tensors what comes and
goes."""

from collections.abc import Collection
from dataclasses import dataclass

from vlmoe_core.analysis.estimate.fake import Device, build_on_meta, trained_parameters
from vlmoe_core.analysis.estimate.follow import Followed, StepMemory, follow
from vlmoe_core.analysis.estimate.routed import Routing
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import Labels


@dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes; of several that of the first, which holds as much as any other."""

    device: Device
    """Whose arithmetic is followed."""
    weights: int
    """Parameters and buffers, float32."""
    copies: int
    """Low-precision copies of the expert weights."""
    gradients: int
    """Of all trained parameters, float32."""
    moments: int
    """The two moments of AdamW."""
    buckets: int
    """DistributedDataParallel's buckets, which hold every gradient once more that it sums; 0 on a single device."""
    plain: StepMemory
    """A step that keeps its activations."""
    checkpointed: StepMemory
    """A step with activation checkpointing."""
    checkpoints: bool
    """Whether the recipe asks for activation checkpointing."""
    checkpoint: int
    """Bytes of a checkpoint on disk: weights and moments of all devices; recipe and tokenizers not counted."""

    @property
    def always(self) -> int:
        """What is there all the time."""
        return self.weights + self.copies + self.moments + self.buckets

    def step(self, checkpointed: bool | None = None) -> StepMemory:
        """What comes and goes; null: as the recipe says."""
        chosen = self.checkpoints if checkpointed is None else checkpointed
        return self.checkpointed if chosen else self.plain

    def peak(self, checkpointed: bool | None = None) -> int:
        """The most bytes at one time; null: as the recipe says."""
        return self.always + self.step(checkpointed).peak


@dataclass(frozen=True)
class Steps:
    """A step on fake tensors, as the recipe is and with the other choice of activation checkpointing."""

    plain: Followed
    """Without it."""
    checkpointed: Followed
    """With it."""
    checkpoints: bool
    """Whether the recipe asks for it."""

    @property
    def own(self) -> Followed:
        """As the recipe says."""
        return self.checkpointed if self.checkpoints else self.plain


def follow_steps(
    recipe: Recipe, labels: Labels, device: Device = "gpu", world: int = 1, routing: Routing = "even"
) -> Steps:
    """Steps of the first of `world` devices, if tokens go where `routing` says."""
    waiting = waiting_gradients(recipe, labels, world)
    plain, checkpointed = (
        follow(_with_checkpointing(recipe, on), labels, device, world, waiting, routing) for on in (False, True)
    )
    return Steps(plain, checkpointed, recipe.train.activation_checkpointing)


def waiting_gradients(recipe: Recipe, labels: Labels, world: int) -> Collection[str]:
    """The parameters whose gradients are there from the second micro-batch of a device on; none if it has but one."""
    return trained_parameters(recipe, labels) if recipe.batch.num_micro > world else ()


def _with_checkpointing(recipe: Recipe, on: bool) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"activation_checkpointing": on})})


def memory_of(recipe: Recipe, labels: Labels, device: Device, steps: Steps) -> Memory:
    """The memory of a device that takes such steps."""
    plain = steps.plain
    return Memory(
        device=device,
        weights=plain.weights,
        copies=plain.copies,
        gradients=plain.gradients,
        moments=2 * plain.gradients,
        buckets=plain.buckets,
        plain=plain.step,
        checkpointed=steps.checkpointed.step,
        checkpoints=steps.checkpoints,
        checkpoint=_checkpoint(recipe, labels, plain.trained),
    )


def _checkpoint(recipe: Recipe, labels: Labels, trained: Collection[str]) -> int:
    objective = build_on_meta(recipe, labels)
    moments = 2 * sum(p.nbytes for name, p in objective.named_parameters() if name in trained)
    return sum(tensor.nbytes for tensor in (*objective.parameters(), *objective.buffers())) + moments
