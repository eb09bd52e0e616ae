import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.moe.reference import brute_force_capacity, brute_force_plan
from vlmoe_core.config import exact
from vlmoe_core.moe.plan import RoutingPlan, capacity_of, make_plan


def plan_of(
    logits: torch.Tensor, top_k: int, capacity: int | None, priority: str = "gate", weights: str = "gate"
) -> RoutingPlan:
    return make_plan(logits, logits, top_k=top_k, weights=weights, priority=priority, capacity=capacity, noise_std=0.0)  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, str | None, str]:
    experts = draw(st.integers(1, 64))
    top_k = draw(st.integers(1, min(4, experts)))
    tokens = draw(st.sampled_from([0, 1, 2, 3, 7, 33]))
    # Few distinct values, so that most cases hold ties between experts and between tokens.
    levels = draw(st.sampled_from([1, 2, 3, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randint(0, levels, (tokens, experts), generator=generator) / levels * 4
    if draw(st.booleans()):
        logits[:, draw(st.integers(0, experts - 1))] += 9
    factor = draw(st.sampled_from([None, "0.25", "0.5", "1.0", "1.05", "1.1", "1.25", "2.0", str(float(experts))]))
    return logits, top_k, factor, draw(st.sampled_from(["gate", "position"]))


@settings(max_examples=400, deadline=None)
@given(cases())
def test_plan_equals_the_double_loop(case: tuple[torch.Tensor, int, str | None, str]) -> None:
    logits, top_k, factor, priority = case
    tokens, experts = logits.shape
    capacity = capacity_of(tokens, experts, top_k, None if factor is None else exact(float(factor)))
    assert capacity == brute_force_capacity(tokens, experts, top_k, factor)
    plan = plan_of(logits, top_k, capacity, priority)
    expert, slot, kept = brute_force_plan(plan.probs_TE.tolist(), top_k, capacity, priority)
    assert plan.expert_TK.tolist() == expert
    assert plan.slot_TK.tolist() == slot
    assert plan.kept_TK.tolist() == kept
    assert (plan.num_experts, plan.top_k) == (experts, top_k)
    torch.testing.assert_close(plan.weight_TK, plan.probs_TE.gather(1, plan.expert_TK), rtol=0, atol=0)


def test_batch_priority_by_hand() -> None:
    # Gates of 4 tokens for 2 experts. Capacity 1: the largest gate wins the place, though it stands last.
    probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]])
    one = plan_of(probs.log(), top_k=1, capacity=1)
    assert one.expert_TK.tolist() == [[0], [0], [1], [1]]
    assert one.slot_TK.tolist() == [[1], [0], [1], [0]]
    assert one.kept_TK.tolist() == [[False], [True], [False], [True]]
    # Two choices, capacity 3: first choices go before any second one, and those in the order of the largest gate.
    two = plan_of(probs.log(), top_k=2, capacity=3)
    assert two.expert_TK.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert two.slot_TK.tolist() == [[1, 3], [0, 2], [1, 3], [0, 2]]
    assert two.kept_TK.tolist() == [[True, False], [True, True], [True, False], [True, True]]


def test_without_priority_the_earlier_token_wins() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]])
    assert plan_of(probs.log(), 1, 1, "position").kept_TK.tolist() == [[True], [False], [True], [False]]


def test_capacity_reads_the_factor_as_a_decimal() -> None:
    # 1.1 * 10 is 11.000000000000002 in floating point.
    assert capacity_of(10, 1, 1, exact(1.1)) == 11
    assert capacity_of(100, 10, 1, exact(1.05)) == 11
    assert capacity_of(0, 4, 1, exact(1.25)) == 1
    assert capacity_of(10, 4, 1, None) is None


def test_renormalised_weights_sum_to_one() -> None:
    plan = plan_of(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), 3, None, weights="renormalised")
    torch.testing.assert_close(plan.weight_TK.sum(1), torch.ones(9))
    gates = plan.probs_TE.gather(1, plan.expert_TK)
    torch.testing.assert_close(plan.weight_TK[:, 0] / plan.weight_TK[:, 2], gates[:, 0] / gates[:, 2])


def test_unit_weights_are_one_and_carry_the_gradient_of_the_log_gate() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plan = plan_of(logits, 2, None, weights="unit")
    assert torch.equal(plan.weight_TK, torch.ones_like(plan.weight_TK))
    (grad,) = torch.autograd.grad(plan.weight_TK.sum(), logits)
    (expected,) = torch.autograd.grad(logits.softmax(-1).log().gather(1, plan.expert_TK).sum(), logits)
    torch.testing.assert_close(grad, expected)


def test_unit_weights_survive_a_gate_of_zero() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    plan = plan_of(logits, 2, None, weights="unit")
    assert plan.weight_TK.tolist() == [[1.0, 1.0]]
    plan.weight_TK.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_the_plan_is_frozen() -> None:
    with pytest.raises(AttributeError):
        plan_of(torch.zeros(2, 2), 1, None).capacity = 3  # type: ignore[misc]
