"""Routers of all kinds, built as a sparse layer builds them."""

from typing import Any

import torch
from torch import Tensor

from vlmoe_core.config import plugin_module
from vlmoe_core.moe.config import ROUTERS, MoEConfig
from vlmoe_core.moe.routing import TopKRouter

ALL = ("softmax", "cosine", "bias-balanced", "hash", "random", "uniform")
LEARNING = ALL[:3]
BASELINES = ALL[3:]


def config_of(router: Any = "softmax", num_experts: int = 4, **values: Any) -> MoEConfig:
    return MoEConfig.model_validate({"num_experts": num_experts, "router": router, **values})


def router_of(
    router: Any = "softmax", num_experts: int = 4, *, dim: int = 8, train: bool = True, seed: int = 0, **values: Any
) -> TopKRouter:
    torch.manual_seed(seed)
    config = config_of(router, num_experts, **values)
    built: TopKRouter = plugin_module(ROUTERS.package, config.router.name).Router(dim, config, 0.5)
    return built.train(train)


def identities(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 30000, (tokens,), generator=torch.Generator().manual_seed(seed))
