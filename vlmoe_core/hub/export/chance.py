"""Models that answer otherwise at every call, so that nothing else can be compared with them."""

from vlmoe_core.errors import UsageError
from vlmoe_core.model.config import ModelConfig

DRAWING = ("random",)
"""Routers that draw experts anew at every call."""


def refuse_chance(model: ModelConfig) -> None:
    """Raises UsageError for a model in which chance decides where a token goes, in evaluation too."""
    for pool, moe in model.pools.items():
        if moe.router.name in DRAWING:
            raise UsageError(
                f"moe.{pool} has the router '{moe.router.name}', which draws experts anew at every call: no export to "
                "other software repeats that; use --format safetensors"
            )
        if moe.priority == "random" and moe.eval_capacity_factor is not None:
            raise UsageError(
                f"moe.{pool} has a capacity in evaluation ({moe.eval_capacity_factor}) and the priority 'random', by "
                "which chance decides which tokens are dropped: no export to other software repeats that; use --format "
                "safetensors, or finetune it with priority: gate first"
            )
