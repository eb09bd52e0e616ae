"""A recipe that several processes share, and wires of which a second carries a byte."""

from math import inf
from typing import Any

from tests.analysis.estimate.support import recipe_of
from vlmoe_core.analysis.scaling.cost import Fabric, Link
from vlmoe_core.analysis.scaling.machine import Machine
from vlmoe_core.recipe.config import Recipe

MOE = {"num_experts": 8, "layers": {"every": 2}, "capacity_factor": 1.25}


def sparse_recipe(expert: int = 1, shard: str = "none", checkpointed: bool = False, **model: Any) -> Recipe:
    """Eight micro-batches of four examples of each stream, in bf16."""
    sizes = {"preset": "tiny", "dim": 128, "moe": {"vision": MOE, "text": {**MOE, "top_k": 2}}}
    return recipe_of(
        {**sizes, **model},
        micro=4,
        num_micro=8,
        train={"precision": "bf16", "activation_checkpointing": checkpointed},
        parallel={"expert": expert, "shard": shard},
    )


def bytes_alone(node: int) -> Machine:
    """A machine that computes in no time and hides nothing: its seconds are bytes on the wire inside a node."""
    link = Link(message=0, hop=0, bandwidth=1)
    return Machine(inf, inf, inf, Fabric(start=0, node=node, inside=link, between=link), behind=0)
