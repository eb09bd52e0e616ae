"""Every balance loss against its published formula, in value and gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe.formulas import FORMULAS, Group
from vlmoe_core.moe import losses
from vlmoe_core.moe.config import BalanceConfig
from vlmoe_core.moe.losses import (
    LOSSES,
    BalanceLoss,
    balance_loss,
    global_entropy_loss,
    importance_loss,
    load_loss,
    local_entropy_loss,
    num_statistics,
    statistics,
    switch_loss,
    vloss,
    weighted_sum,
    z_loss,
)
from vlmoe_core.moe.plan import RoutingPlan, make_plan

EXPERTS, SIGMA = 5, 0.2
# The random logits' entropies lie between 0.9 and log(5) = 1.61: thresholds on both sides of them.
CASES: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in FORMULAS),
    ("local_entropy", {"local_entropy_threshold": 0.3}),
    ("local_entropy", {"local_entropy_threshold": 1.7}),
    ("global_entropy", {"global_entropy_threshold": 0.3}),
    ("global_entropy", {"global_entropy_threshold": 1.7}),
]
ALONE: dict[str, Callable[[RoutingPlan], Tensor]] = {
    "importance": importance_loss,
    "load": load_loss,
    "switch": switch_loss,
    "z": z_loss,
    "local_entropy": local_entropy_loss,
    "global_entropy": global_entropy_loss,
    "vloss": vloss,
}
ALL = BalanceConfig(**{name: 0.5 + n for n, name in enumerate(FORMULAS)})


def plan_of(clean: Tensor, noise: Tensor, top_k: int = 1, noise_std: float = SIGMA) -> RoutingPlan:
    return make_plan(
        clean, clean + noise, top_k=top_k, weights="gate", priority="gate", capacity=None, noise_std=noise_std
    )


def random_logits(tokens: int, dtype: torch.dtype = torch.float64, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    clean, noise = torch.randn(2, tokens, experts, generator=generator, dtype=torch.float64).to(dtype)
    return clean.requires_grad_(), noise * SIGMA


def only(name: str, thresholds: dict[str, float], weight: float = 1.0) -> BalanceConfig:
    return BalanceConfig(**{name: weight}, **thresholds)


def group_of(plan: RoutingPlan, clean: Tensor, noise: Tensor, thresholds: dict[str, float]) -> Group:
    return Group(
        clean.detach().double().tolist(),
        (clean.detach() + noise).double().tolist(),
        plan.top_k,
        SIGMA,
        thresholds.get("local_entropy_threshold"),
        thresholds.get("global_entropy_threshold"),
    )


@pytest.mark.parametrize(("name", "thresholds"), CASES)
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_losses_equal_the_published_formulas(
    name: str, thresholds: dict[str, float], tokens: int, top_k: int, dtype: torch.dtype, tolerance: float
) -> None:
    clean, noise = random_logits(tokens, dtype)
    plan = plan_of(clean, noise, top_k)
    wanted = FORMULAS[name](group_of(plan, clean, noise, thresholds))
    got = balance_loss(plan, only(name, thresholds))
    assert got.dtype == dtype and got.shape == ()
    assert got.item() == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    if not thresholds:
        assert ALONE[name](plan).item() == got.item()


@pytest.mark.parametrize(("name", "thresholds"), CASES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_equal_finite_differences_of_the_formulas(
    name: str, thresholds: dict[str, float], top_k: int
) -> None:
    clean, noise = random_logits(6)
    plan = plan_of(clean, noise, top_k)
    (got,) = torch.autograd.grad(balance_loss(plan, only(name, thresholds)), clean)
    step, wanted = 1e-6, torch.zeros_like(clean)
    for place in range(clean.numel()):
        moved = torch.zeros_like(clean).view(-1).index_fill(0, torch.tensor(place), step).view_as(clean)
        up, down = (FORMULAS[name](group_of(plan, clean + sign * moved, noise, thresholds)) for sign in (1, -1))
        wanted.view(-1)[place] = (up - down) / (2 * step)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    active = thresholds not in ({"local_entropy_threshold": 1.7}, {"global_entropy_threshold": 0.3})
    assert bool(got.any()) == active


@pytest.mark.parametrize(("name", "thresholds"), CASES)
def test_gradients_pass_gradcheck(name: str, thresholds: dict[str, float]) -> None:
    clean, noise = random_logits(7)
    config = only(name, thresholds, weight=0.3)
    assert torch.autograd.gradcheck(lambda c: balance_loss(plan_of(c, noise, 2), config), (clean,))


def test_load_compares_logits_with_logits() -> None:
    # A constant added to every logit changes no choice, so it must not change the loss.
    clean, noise = random_logits(30)
    loss = load_loss(plan_of(clean, noise))
    assert load_loss(plan_of(clean + 100, noise)).item() == pytest.approx(loss.item(), rel=1e-9)


def test_the_shares_of_the_switch_loss_count_first_choices_with_noise() -> None:
    clean = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    plan = plan_of(clean, torch.tensor([[3.0, 0.0], [0.0, 0.0]]), top_k=2)
    gates = plan.noisy_logits_TE.softmax(1).mean(0)
    assert switch_loss(plan).item() == pytest.approx(2 * (0.5 * gates[0] + 0.5 * gates[1]).item())


def test_the_switch_loss_is_one_when_balanced_and_the_number_of_experts_at_collapse() -> None:
    balanced, collapsed = torch.eye(4) * 60, torch.tensor([[60.0, 0, 0, 0]]).repeat(4, 1)
    assert switch_loss(plan_of(balanced, torch.zeros(4, 4))).item() == pytest.approx(1)
    assert switch_loss(plan_of(collapsed, torch.zeros(4, 4))).item() == pytest.approx(4)


def test_entropies_at_their_bounds() -> None:
    sure, even = torch.eye(4) * 60, torch.zeros(4, 4)
    assert local_entropy_loss(plan_of(sure, even)).item() == pytest.approx(0, abs=1e-6)
    assert local_entropy_loss(plan_of(even, even)).item() == pytest.approx(math.log(4))
    assert global_entropy_loss(plan_of(sure, even)).item() == pytest.approx(-math.log(4))
    assert global_entropy_loss(plan_of(sure[:1], even[:1])).item() == pytest.approx(0, abs=1e-6)
    # log(2) asks for two experts: those that two tokens use are enough.
    assert global_entropy_loss(plan_of(sure[:2], even[:2]), math.log(2) - 1e-6).item() == 0
    assert global_entropy_loss(plan_of(sure[:1], even[:1]), math.log(2)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("name", "thresholds"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_give_a_differentiable_zero(name: str, thresholds: dict[str, float], dtype: torch.dtype) -> None:
    weight = torch.randn(EXPERTS, 3, dtype=dtype, requires_grad=True)
    clean = torch.zeros(0, 3, dtype=dtype) @ weight.t()
    value = balance_loss(plan_of(clean, torch.zeros_like(clean)), only(name, thresholds))
    value.backward()
    assert value.item() == 0
    assert weight.grad is not None and (weight.grad == 0).all()


@pytest.mark.parametrize(("name", "thresholds"), CASES)
@pytest.mark.parametrize("scale", [200.0, 1e4])
@pytest.mark.parametrize("tokens", [1, 7])
def test_gates_that_underflow_give_finite_gradients(
    name: str, thresholds: dict[str, float], scale: float, tokens: int
) -> None:
    clean = (random_logits(tokens, torch.float32)[0].detach() * scale).requires_grad_()
    plan = plan_of(clean, torch.zeros_like(clean), top_k=2)
    assert (plan.probs_TE == 0).any()
    value = balance_loss(plan, only(name, thresholds))
    (grad,) = torch.autograd.grad(value, clean)
    assert torch.isfinite(value) and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_one_expert_gives_finite_values_and_gradients(name: str) -> None:
    clean = torch.randn(6, 1, requires_grad=True)
    value = balance_loss(plan_of(clean, torch.zeros_like(clean)), only(name, {}))
    (grad,) = torch.autograd.grad(value, clean)
    wanted = {"switch": 1.0, "z": clean.square().mean().item()}.get(name, 0.0)
    assert value.item() == pytest.approx(wanted, abs=1e-6)
    assert torch.isfinite(grad).all()


def test_load_needs_noise() -> None:
    clean, noise = random_logits(4)
    with pytest.raises(ValueError, match="not defined for a plan without noise"):
        load_loss(plan_of(clean, noise * 0, noise_std=0.0))


@pytest.mark.parametrize("cut", [0, 1, 5, 13])
@pytest.mark.parametrize("top_k", [1, 3])
def test_statistics_of_groups_add_up_to_those_of_the_joined_group(cut: int, top_k: int) -> None:
    clean, noise = random_logits(13)
    joined = statistics(plan_of(clean, noise, top_k), ALL)
    first, second = (plan_of(clean[span], noise[span], top_k) for span in (slice(cut), slice(cut, None)))
    torch.testing.assert_close(statistics(first, ALL) + statistics(second, ALL), joined, rtol=1e-12, atol=1e-12)
    assert joined.shape == (num_statistics(ALL, EXPERTS),)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_of_added_statistics_is_that_of_the_joined_group(name: str) -> None:
    clean, noise = random_logits(13)
    config = only(name, {})
    total = sum(
        (statistics(plan_of(clean[i : i + 4], noise[i : i + 4]), config) for i in range(0, 13, 4)), torch.tensor(0)
    )
    got, wanted = weighted_sum(total, config, EXPERTS), balance_loss(plan_of(clean, noise), config)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    for one, other in zip(torch.autograd.grad(got, clean), torch.autograd.grad(wanted, clean), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def refuse(*_: Any) -> Any:
    raise AssertionError("a loss of weight 0 was computed")


@pytest.mark.parametrize("name", LOSSES)
def test_weight_zero_is_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, noise = random_logits(9)
    plan, config = plan_of(clean, noise), BalanceConfig(**{name: 0.3})
    wanted = balance_loss(plan, config).item()
    for other in LOSSES.keys() - {name}:
        monkeypatch.setitem(losses.LOSSES, other, BalanceLoss(refuse, refuse, refuse))
    assert balance_loss(plan, config).item() == wanted != 0
    monkeypatch.setitem(losses.LOSSES, name, BalanceLoss(refuse, refuse, refuse))
    with pytest.raises(AssertionError, match="was computed"):
        balance_loss(plan, config)
    assert balance_loss(plan, BalanceConfig(**{name: 0.0})).item() == 0


def test_vloss_is_dealt_to_its_halves() -> None:
    assert BalanceConfig().weights == {}
    assert BalanceConfig(vloss=0.5, load=3.0).weights == {"importance": 0.25, "load": 3.25}
    assert BalanceConfig(load=0.3).weights == {"load": 0.3}


def test_the_weighted_sum() -> None:
    clean, noise = random_logits(9)
    plan = plan_of(clean, noise, 2)
    parts = sum(getattr(ALL, name) * loss(plan).item() for name, loss in ALONE.items())
    assert balance_loss(plan, ALL).item() == pytest.approx(parts, rel=1e-12)
    loud = BalanceConfig(
        local_entropy=2.0, local_entropy_threshold=0.3, global_entropy=3.0, global_entropy_threshold=1.7
    )
    wanted = 2 * local_entropy_loss(plan, 0.3) + 3 * global_entropy_loss(plan, 1.7)
    assert balance_loss(plan, loud).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_every_weight_of_the_recipe_is_a_loss() -> None:
    fields = {name for name in BalanceConfig.model_fields if not name.endswith("threshold")}
    assert fields == {*LOSSES, "vloss"} == set(FORMULAS)
