"""What several processes would do together: what each holds, a step of the first one, and what it sends."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlmoe_core.analysis.estimate.fake import Device
from vlmoe_core.analysis.estimate.follow import Followed, follow
from vlmoe_core.analysis.estimate.memory import waiting_gradients
from vlmoe_core.analysis.estimate.sends import Traffic, traffic
from vlmoe_core.analysis.estimate.shares import Holding, holdings
from vlmoe_core.analysis.estimate.world import check_world
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import Labels


@dataclass(frozen=True)
class Rehearsal:
    """What is known of a run on several processes."""

    size: int
    """Number of processes."""
    expert: int
    """Processes that share the experts of a layer."""
    shard: Literal["none", "full"]
    """Whether weights are cut over all processes."""
    micros: int
    """Micro-batches of a process in a step."""
    holdings: tuple[Holding, ...]
    """What the processes hold that were built."""
    even: Followed
    """A step of the first process, tokens spread evenly over the experts."""
    one_sided: Followed
    """The same in the worst case, where tokens choose its experts as long as these have places."""
    traffic: tuple[Traffic, ...]
    """What the first process sends in a step, by kind."""

    @property
    def replicas(self) -> int:
        """How many hold the same share of the experts."""
        return self.size // self.expert

    @property
    def most(self) -> Holding:
        """Who holds the most parameters."""
        return max(self.holdings, key=lambda one: one.parameters)

    @property
    def least(self) -> Holding:
        """Who holds the fewest."""
        return min(self.holdings, key=lambda one: one.parameters)

    @property
    def peak(self) -> int:
        """The most bytes of the first process at one time."""
        return self.holdings[0].bytes + self.even.step.peak

    @property
    def worst_peak(self) -> int:
        """The same in the worst case."""
        return self.holdings[0].bytes + self.one_sided.step.peak

    @property
    def wire(self) -> int:
        """Bytes that the first process sends in a step."""
        return sum(one.even for one in self.traffic)

    @property
    def worst_wire(self) -> int:
        """The same in the worst case."""
        return sum(one.one_sided for one in self.traffic)

    def as_json(self) -> dict[str, Any]:
        """For machines: numbers of parameters, bytes."""
        return {
            "size": self.size,
            "expert": self.expert,
            "replicas": self.replicas,
            "shard": self.shard,
            "micro_batches": self.micros,
            "ranks": {"how": "exact", "most": _holding(self.most), "least": _holding(self.least)},
            "peak": {"how": "counted", "even": self.peak, "one_sided": self.worst_peak},
            "wire": {
                "even": self.wire,
                "one_sided": self.worst_wire,
                "kinds": [asdict(one) for one in self.traffic],
            },
        }


def rehearse(recipe: Recipe, labels: Labels, world: int, device: Device = "gpu") -> Rehearsal:
    """Build the share of every process, and follow a step of the first one.

    Raises:
        UsageError, RecipeError: see `check_world`.
    """
    check_world(recipe, world)
    waiting = waiting_gradients(recipe, labels, world)
    even = follow(recipe, labels, device, world, waiting)
    one_sided = follow(recipe, labels, device, world, waiting, "one-sided") if shares_experts(recipe, world) else even
    return rehearsed(recipe, labels, world, range(world), even, one_sided)


def rehearsed(
    recipe: Recipe, labels: Labels, world: int, ranks: Iterable[int], even: Followed, one_sided: Followed
) -> Rehearsal:
    """The steps that were followed, with what each of these ranks holds; the first of them is 0."""
    trained: Collection[str] = even.trained
    return Rehearsal(
        size=world,
        expert=recipe.parallel.expert if world > 1 else 1,
        shard=recipe.parallel.shard,
        micros=recipe.batch.num_micro // world,
        holdings=tuple(holdings(recipe, labels, world, trained, ranks)),
        even=even,
        one_sided=one_sided,
        traffic=traffic(world, recipe.batch.num_micro, even, one_sided),
    )


def shares_experts(recipe: Recipe, world: int) -> bool:
    """Whether tokens travel, so that it matters where to."""
    return world > 1 and recipe.parallel.expert > 1


def _holding(holding: Holding) -> dict[str, int]:
    return {**asdict(holding), "parameters": holding.parameters, "bytes": holding.bytes}
