"""Statistics added up over two processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.train.support import on_ranks
from vlmoe_core.moe.config import BalanceConfig
from vlmoe_core.moe.losses import statistics, weighted_sum
from vlmoe_core.moe.plan import RoutingPlan, make_plan
from vlmoe_core.moe.scope import over_ranks

LOSSES = BalanceConfig(
    vloss=1.0,
    importance=0.5,
    switch=0.7,
    z=0.3,
    local_entropy=0.4,
    global_entropy=0.6,
    local_entropy_threshold=0.2,
    global_entropy_threshold=1.5,
)
CASES: dict[str, tuple[int, int]] = {"even": (6, 6), "odd": (9, 2), "empty": (7, 0), "all empty": (0, 0)}
"""Tokens of each rank's group."""


def logits_of(rank: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    clean, noise = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(rank), dtype=dtype)
    return clean.requires_grad_(), noise * 0.2


def plan_of(clean: Tensor, noise: Tensor) -> RoutingPlan:
    return make_plan(clean, clean + noise, top_k=2, weights="gate", priority="gate", capacity=None, noise_std=0.2)


def losses_on_rank(dtype: torch.dtype) -> dict[str, Any]:
    """For a child: the loss and the gradient of its own logits, two groups at a time."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for name, tokens in CASES.items():
        groups = [logits_of(10 * number + rank, tokens[(rank + number) % 2], dtype) for number in range(2)]
        has_tokens = [len(clean) > 0 for clean, _ in groups]
        own = [statistics(plan_of(*group), LOSSES) for group in groups]
        totals = over_ranks(own, has_tokens)
        values = [weighted_sum(total, LOSSES, 5) * has for total, has in zip(totals, has_tokens, strict=True)]
        sum(values, torch.tensor(0.0)).backward()
        found[name] = [(v.item(), clean.grad.numpy()) for v, (clean, _) in zip(values, groups, strict=True)]
        assert all(total.dtype == dtype for total in totals)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def found(request: pytest.FixtureRequest) -> tuple[torch.dtype, list[dict[str, Any]]]:
    answers = on_ranks(2, losses_on_rank, request.param)
    for answer in answers:
        assert isinstance(answer, dict), answer
    return request.param, answers


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_joined_group_and_the_gradient_that_of_the_sum_over_ranks(
    name: str, found: tuple[torch.dtype, list[dict[str, Any]]]
) -> None:
    dtype, answers = found
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for number in range(2):
        groups = [logits_of(10 * number + rank, CASES[name][(rank + number) % 2], dtype) for rank in range(2)]
        joined = plan_of(torch.cat([clean for clean, _ in groups]), torch.cat([noise for _, noise in groups]))
        loss = weighted_sum(statistics(joined, LOSSES), LOSSES, 5)
        holders = sum(len(clean) > 0 for clean, _ in groups)
        grads = torch.autograd.grad(holders * loss, [clean for clean, _ in groups])
        for rank, (clean, _) in enumerate(groups):
            value, grad = answers[rank][name][number]
            assert value == pytest.approx(loss.item() if len(clean) else 0.0, rel=tolerance["rtol"])
            torch.testing.assert_close(torch.from_numpy(grad), grads[rank], **tolerance)
            assert len(clean) == 0 or grads[rank].any()


def test_one_process_keeps_its_statistics() -> None:
    own = [statistics(plan_of(*logits_of(0, tokens, torch.float64)), LOSSES) for tokens in (4, 0)]
    assert all(a is b for a, b in zip(over_ranks(own, [True, False]), own, strict=True))
