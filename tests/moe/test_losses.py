import math

import numpy as np
import pytest
import torch

from vlmoe_core.moe.config import BalanceConfig
from vlmoe_core.moe.losses import balance_loss, balance_losses, importance_loss, load_loss, vloss
from vlmoe_core.moe.plan import RoutingPlan, make_plan

EXPERTS, SIGMA = 5, 0.2


def plan_of(clean: torch.Tensor, noise: torch.Tensor, top_k: int, noise_std: float = SIGMA) -> RoutingPlan:
    return make_plan(
        clean, clean + noise, top_k=top_k, weights="gate", priority="gate", capacity=None, noise_std=noise_std
    )


def random_logits(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    clean, noise = torch.randn(2, tokens, EXPERTS, generator=generator, dtype=torch.float64).to(dtype)
    return clean.requires_grad_(), noise * SIGMA


def numpy_importance(clean: np.ndarray) -> float:
    gates = np.exp(clean - clean.max(1, keepdims=True))
    importance = (gates / gates.sum(1, keepdims=True)).sum(0)
    return float((np.std(importance) / np.mean(importance)) ** 2)


def numpy_load(clean: np.ndarray, noisy: np.ndarray, top_k: int) -> float:
    threshold = np.sort(noisy, axis=1)[:, -top_k]
    cdf = np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))
    load = (1 - cdf((threshold[:, None] - clean) / SIGMA)).mean(0)
    return float((np.std(load) / np.mean(load)) ** 2)


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_losses_equal_the_published_formulas(tokens: int, top_k: int, dtype: torch.dtype, rel: float) -> None:
    clean, noise = random_logits(tokens, dtype)
    plan = plan_of(clean, noise, top_k)
    importance = numpy_importance(clean.detach().double().numpy())
    load = numpy_load(clean.detach().double().numpy(), plan.noisy_logits_TE.detach().double().numpy(), top_k)
    assert importance_loss(plan).item() == pytest.approx(importance, rel=rel)
    assert load_loss(plan).item() == pytest.approx(load, rel=rel, abs=1e-7)
    assert vloss(plan).item() == pytest.approx((importance + load) / 2, rel=rel)


@pytest.mark.parametrize("loss", [importance_loss, load_loss, vloss])
@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_equal_finite_differences(loss: object, top_k: int) -> None:
    clean, noise = random_logits(7)
    assert torch.autograd.gradcheck(lambda c: loss(plan_of(c, noise, top_k)), (clean,))  # type: ignore[operator]


def test_load_compares_logits_with_logits() -> None:
    # A constant added to every logit changes no choice, so it must not change the loss.
    clean, noise = random_logits(30)
    loss = load_loss(plan_of(clean, noise, 1))
    assert load_loss(plan_of(clean + 100, noise, 1)).item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("loss", [importance_loss, load_loss, vloss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_give_a_differentiable_zero(loss: object, dtype: torch.dtype) -> None:
    weight = torch.randn(EXPERTS, 3, dtype=dtype, requires_grad=True)
    clean = torch.zeros(0, 3, dtype=dtype) @ weight.t()
    value = loss(plan_of(clean, torch.zeros_like(clean), 1))  # type: ignore[operator]
    value.backward()
    assert value.item() == 0
    assert weight.grad is not None and (weight.grad == 0).all()


def test_one_expert_is_always_balanced() -> None:
    clean = torch.randn(6, 1, requires_grad=True)
    value = vloss(plan_of(clean, torch.zeros_like(clean), 1))
    value.backward()
    assert value.item() == 0
    assert clean.grad is not None and torch.isfinite(clean.grad).all()


def test_load_needs_noise() -> None:
    clean, noise = random_logits(4)
    with pytest.raises(ValueError, match="not defined for a plan without noise"):
        load_loss(plan_of(clean, noise * 0, 1, noise_std=0.0))


def test_weight_zero_is_not_computed() -> None:
    plan = plan_of(*random_logits(9), 1)
    assert set(balance_losses(plan, BalanceConfig())) == {"vloss"}
    assert set(balance_losses(plan, BalanceConfig(vloss=0, load=0.3))) == {"load"}
    assert balance_loss(plan, BalanceConfig(vloss=0)).item() == 0


def test_the_weighted_sum() -> None:
    plan = plan_of(*random_logits(9), 1)
    total = balance_loss(plan, BalanceConfig(vloss=0.5, importance=2.0, load=3.0))
    parts = 0.5 * vloss(plan) + 2 * importance_loss(plan) + 3 * load_loss(plan)
    assert total.item() == pytest.approx(parts.item())


def test_evaluation_reports_what_is_defined() -> None:
    clean, noise = random_logits(9)
    plan = plan_of(clean, noise * 0, 1, noise_std=0.0)
    assert set(balance_losses(plan, BalanceConfig(importance=0.1, load=0.1))) == {"importance"}
    assert balance_loss(plan, BalanceConfig()).item() == 0
