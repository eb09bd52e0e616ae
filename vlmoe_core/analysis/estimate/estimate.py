"""How big a run is, how long it takes and whether it fits, from its recipe alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlmoe_core.analysis.estimate.caveats import modelled_otherwise, not_counted
from vlmoe_core.analysis.estimate.fake import Device, build_on_meta
from vlmoe_core.analysis.estimate.flops import Flops, example_flops, step_flops
from vlmoe_core.analysis.estimate.memory import Memory, Steps, follow_steps, memory_of
from vlmoe_core.analysis.estimate.parameters import Parameters, count_parameters
from vlmoe_core.analysis.estimate.rehearsal import Rehearsal, rehearsed, shares_experts
from vlmoe_core.analysis.estimate.routing import Group
from vlmoe_core.analysis.estimate.world import check_world
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.stand_ins import MADE_UP_LABELS, stand_in_labels


@dataclass(frozen=True)
class Machine:
    """What the run is to run on."""

    device: Device = "gpu"
    """Kind of device."""
    world: int | None = None
    """How many, each with its share of a step's micro-batches and of the model; null: one, that holds everything."""
    tflops: float | None = None
    """Sustained rate of one device, in 10^12 operations a second; null: no time is estimated."""

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.world or 1


@dataclass(frozen=True)
class Estimate:
    """Everything that is known of a run before it starts."""

    parameters: Parameters
    """Exact."""
    flops: Mapping[StreamName, Flops]
    """Of one example of each stream in training."""
    flops_how: str
    """modelled: by formulas; counted: in a step on fake tensors."""
    step_flops: int
    """Of an optimiser step, over all devices."""
    groups: tuple[Group, ...]
    """Tokens and places of the experts."""
    memory: Memory
    """Of one device."""
    worst: Memory
    """The same, if tokens choose the experts of that device as long as these have places."""
    rehearsal: Rehearsal | None
    """What several devices would do together; null: there is one."""
    machine: Machine
    """What it was asked for."""
    hours: float | None
    """Of all training steps; null where no rate was given."""
    labels: int | None
    """Labels that a task's head was taken to have; null where the data don't decide on them."""
    not_counted: tuple[str, ...]
    """What no figure holds."""
    otherwise: tuple[str, ...]
    """What the figures take to be otherwise than in the run."""

    def as_json(self) -> dict[str, Any]:
        """For machines: bytes, operations, numbers of parameters, hours."""
        memory = self.memory
        return {
            "params": {"how": "exact", **asdict(self.parameters)},
            "flops": {
                "how": self.flops_how,
                "examples": {stream: {**asdict(one), "total": one.total} for stream, one in self.flops.items()},
                "step": self.step_flops,
            },
            "routing": {"how": "exact", "groups": [_group(group) for group in self.groups]},
            "memory": {
                "how": {"always": "exact", "gradients": "exact", "steps": "counted", "buckets": "exact"},
                "device": memory.device,
                "weights": memory.weights,
                "copies": memory.copies,
                "gradients": memory.gradients,
                "moments": memory.moments,
                "buckets": memory.buckets,
                "plain": _step(memory, self.worst, False),
                "checkpointed": _step(memory, self.worst, True),
                "activation_checkpointing": memory.checkpoints,
                "peak": memory.peak(),
            },
            "world": None if self.rehearsal is None else self.rehearsal.as_json(),
            "checkpoint": {"how": "exact", "bytes": memory.checkpoint},
            "time": {
                "how": "modelled",
                "device": self.machine.device,
                "devices": self.machine.devices,
                "tflops": self.machine.tflops,
                "hours": self.hours,
            },
            "labels": self.labels,
            "not_counted": self.not_counted,
            "otherwise": self.otherwise,
        }


def estimate(recipe: Recipe, machine: Machine, num_labels: int | None = None) -> Estimate:
    """Estimate a run. No file is read and no weight is allocated.

    Args:
        recipe: the run.
        machine: what it is to run on.
        num_labels: labels of the head of a task whose data decide on them; null: 1,000.

    Raises:
        UsageError: the data decide on no labels, and a number of them was given; or this process is one of several.
        RecipeError: so many devices can't train the recipe together.
    """
    world = machine.devices
    if machine.world is not None:
        check_world(recipe, world)
    count = _num_labels(recipe, num_labels)
    labels = stand_in_labels(recipe, count or 0)
    flops = example_flops(recipe, labels)
    step = step_flops(recipe, flops)
    even = follow_steps(recipe, labels, machine.device, world)
    worst = even
    if shares_experts(recipe, world):
        worst = follow_steps(recipe, labels, machine.device, world, "one-sided")
    return Estimate(
        parameters=count_parameters(recipe, build_on_meta(recipe, labels)),
        flops=flops,
        flops_how="modelled" if recipe.task is None else "counted",
        step_flops=step,
        groups=even.plain.groups,
        memory=memory_of(recipe, labels, machine.device, even),
        worst=memory_of(recipe, labels, machine.device, worst),
        rehearsal=_rehearsal(recipe, labels, world, even, worst),
        machine=machine,
        hours=None if machine.tflops is None else _hours(step * recipe.train.steps, machine.tflops * world),
        labels=count,
        not_counted=tuple(not_counted(recipe, machine.device, world)),
        otherwise=tuple(modelled_otherwise(recipe, machine.device, count, machine.world)),
    )


def _rehearsal(recipe: Recipe, labels: Labels, world: int, even: Steps, worst: Steps) -> Rehearsal | None:
    """Of the first process, which holds the most, and the last, which holds the least."""
    return None if world == 1 else rehearsed(recipe, labels, world, (0, world - 1), even.own, worst.own)


def _num_labels(recipe: Recipe, said: int | None) -> int | None:
    """How many labels are made up; null where the data decide on none."""
    if recipe.task is not None and open_task(recipe.task).known_labels is None:
        return MADE_UP_LABELS if said is None else said
    if said is not None:
        kind = "pretraining" if recipe.task is None else f"the task {recipe.task.name}"
        raise UsageError(f"--labels {said}: {kind} has no labels that its data decide on; leave the option out")
    return None


def _hours(flops: int, tflops: float) -> float:
    return flops / (tflops * 1e12) / 3600


def _group(group: Group) -> dict[str, Any]:
    derived = {"mean": group.mean, "places": group.places, "effective_batch": group.effective_batch}
    return {**asdict(group), **derived}


def _step(memory: Memory, worst: Memory, checkpointed: bool) -> dict[str, Any]:
    step = memory.step(checkpointed)
    peaks = {"peak": memory.peak(checkpointed), "worst_peak": worst.peak(checkpointed)}
    return {**asdict(step), "activations": step.activations, **peaks}
