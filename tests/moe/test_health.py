import math

import pytest
import torch

from vlmoe_core.moe.health import health_of, router_health, tally
from vlmoe_core.moe.plan import RoutingPlan, make_plan


def plan_of(logits: torch.Tensor, top_k: int = 1, capacity: int | None = None) -> RoutingPlan:
    return make_plan(logits, logits, top_k=top_k, weights="gate", priority="gate", capacity=capacity, noise_std=0.0)


def test_health_by_hand() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [8.0, 0, 0, 0], [7.0, 0, 0, 0], [0, 9.0, 0, 0]], requires_grad=True)
    health = router_health(plan_of(logits, capacity=2))
    assert health["busiest"].item() == 0.75
    assert health["dead"].item() == 2
    assert health["dropped"].item() == 0.25
    probs = logits.softmax(-1)
    assert health["entropy"].item() == pytest.approx(-(probs * probs.log()).sum(1).mean().item())
    assert not any(value.requires_grad for value in health.values())


def test_uniform_routers_have_the_entropy_of_the_number_of_experts() -> None:
    assert router_health(plan_of(torch.zeros(5, 8)))["entropy"].item() == pytest.approx(math.log(8))


def test_tallies_of_micro_batches_add_up() -> None:
    first, second = torch.tensor([[9.0, 0]]), torch.tensor([[0, 9.0], [0, 9.0], [0, 9.0]])
    summed = health_of(tally(plan_of(first)) + tally(plan_of(second)))
    whole = router_health(plan_of(torch.cat([first, second])))
    assert {k: v.item() for k, v in summed.items()} == pytest.approx({k: v.item() for k, v in whole.items()})
    assert router_health(plan_of(first))["dead"].item() == 1
    assert summed["dead"].item() == 0


def test_no_tokens() -> None:
    health = router_health(plan_of(torch.zeros(0, 3)))
    assert {k: v.item() for k, v in health.items()} == {"busiest": 0, "dead": 3, "dropped": 0, "entropy": 0}


def test_it_works_on_meta() -> None:
    assert all(v.shape == () for v in router_health(plan_of(torch.zeros(4, 3, device="meta"))).values())
