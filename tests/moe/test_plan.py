import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.moe.reference import (
    brute_force_capacity,
    brute_force_choice,
    brute_force_plan,
    brute_force_slots,
    brute_force_walk,
    walk_that_explains,
)
from vlmoe_core.decimals import exact
from vlmoe_core.moe.config import Priority, Weights
from vlmoe_core.moe.plan import RoutingPlan, capacity_of, make_plan


def plan_of(
    logits: torch.Tensor,
    top_k: int,
    capacity: int | None,
    priority: Priority = "gate",
    weights: Weights = "gate",
    choice_bias: torch.Tensor | None = None,
) -> RoutingPlan:
    return make_plan(
        logits,
        logits,
        top_k=top_k,
        weights=weights,
        priority=priority,
        capacity=capacity,
        noise_std=0.0,
        choice_bias_E=choice_bias,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int | None]:
    """Logits, choices and capacity."""
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
    capacity = capacity_of(tokens, experts, top_k, None if factor is None else exact(float(factor)))
    assert capacity == brute_force_capacity(tokens, experts, top_k, factor)
    return logits, top_k, capacity


@settings(max_examples=1200, deadline=None)
@given(cases(), st.sampled_from(["gate", "position"]))
def test_plan_equals_the_double_loop(case: tuple[torch.Tensor, int, int | None], priority: Priority) -> None:
    logits, top_k, capacity = case
    plan = plan_of(logits, top_k, capacity, priority)
    expert, slot, kept = brute_force_plan(plan.probs_TE.tolist(), top_k, capacity, priority)
    assert plan.expert_TK.tolist() == expert
    assert plan.slot_TK.tolist() == slot
    assert plan.kept_TK.tolist() == kept
    assert (plan.num_experts, plan.top_k) == (logits.shape[1], top_k)
    torch.testing.assert_close(plan.weight_TK, plan.probs_TE.gather(1, plan.expert_TK), rtol=0, atol=0)


@settings(max_examples=400, deadline=None)
@given(cases(), st.integers(0, 10**6), st.sampled_from([0.0, 0.01, 1.0]))
def test_a_choice_bias_moves_the_choice_alone(
    case: tuple[torch.Tensor, int, int | None], seed: int, size: float
) -> None:
    logits, top_k, capacity = case
    bias = size * torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    plan = plan_of(logits, top_k, capacity, choice_bias=bias)
    probs = logits.softmax(-1)
    assert torch.equal(plan.probs_TE, probs)
    chosen = brute_force_choice((probs + bias).tolist(), top_k)
    slot, kept = brute_force_slots(chosen, brute_force_walk(probs.tolist(), "gate"), top_k, capacity)
    assert (plan.expert_TK.tolist(), plan.slot_TK.tolist(), plan.kept_TK.tolist()) == (chosen, slot, kept)
    assert torch.equal(plan.weight_TK, probs.gather(1, plan.expert_TK))


@settings(max_examples=400, deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_random_priority_is_some_walk_that_the_seed_decides(
    case: tuple[torch.Tensor, int, int | None], seed: int
) -> None:
    logits, top_k, capacity = case
    torch.manual_seed(seed)
    plan = plan_of(logits, top_k, capacity, "random")
    torch.manual_seed(seed)
    assert torch.equal(plan_of(logits, top_k, capacity, "random").slot_TK, plan.slot_TK)
    chosen = brute_force_choice(logits.softmax(-1).tolist(), top_k)
    assert plan.expert_TK.tolist() == chosen
    walk = walk_that_explains(chosen, plan.slot_TK.tolist())
    slot, kept = brute_force_slots(chosen, walk, top_k, capacity)
    assert (plan.slot_TK.tolist(), plan.kept_TK.tolist()) == (slot, kept)
    demand = torch.bincount(plan.expert_TK.flatten(), minlength=logits.shape[1])
    served = torch.bincount(plan.expert_TK[plan.kept_TK], minlength=logits.shape[1])
    assert torch.equal(served, demand if capacity is None else demand.clamp_max(capacity))


def test_random_priority_prefers_no_token() -> None:
    # 8 tokens of different gates compete for 2 places: each gets one in a quarter of 4,000 draws.
    logits = torch.stack([torch.arange(8.0), torch.full((8,), -9.0)], dim=1)
    torch.manual_seed(0)
    kept = sum(plan_of(logits, 1, 2, "random").kept_TK[:, 0].float() for _ in range(4000))
    assert isinstance(kept, torch.Tensor) and kept.sum().item() == 8000
    assert (kept / 4000 - 0.25).abs().max().item() < 0.03


def test_only_random_priority_draws() -> None:
    for priority, draws in [("gate", False), ("position", False), ("random", True)]:
        state = torch.get_rng_state()
        plan_of(torch.zeros(5, 3), 1, 2, priority)  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), state) != draws


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 9), (0, 0), (9, 9), (0, 9)])
def test_some_tokens_of_a_plan_keep_what_the_whole_group_decided(start: int, stop: int) -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plan = plan_of(logits, 2, 3)
    part = plan.tokens(start, stop)
    for name in ("expert_TK", "weight_TK", "slot_TK", "kept_TK", "clean_logits_TE", "noisy_logits_TE", "probs_TE"):
        assert torch.equal(getattr(part, name), getattr(plan, name)[start:stop]), name
    assert (part.capacity, part.noise_std, part.num_experts, part.top_k) == (3, 0.0, 4, 2)
    assert part.weight_TK.requires_grad


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


def test_renormalised_weights_survive_gates_of_zero() -> None:
    # The bias steers the second choice to experts whose gates underflowed.
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    plan = make_plan(
        logits,
        logits,
        top_k=2,
        weights="renormalised",
        priority="gate",
        capacity=None,
        noise_std=0.0,
        choice_bias_E=torch.tensor([-1.5, 0.0, 0.0]),
    )
    assert plan.expert_TK.tolist() == [[1, 2]]
    assert plan.weight_TK.sum().item() == pytest.approx(1)
    plan.weight_TK[0, 0].backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
