import math
from typing import Any

import pytest
import torch

from tests.moe.routers.support import config_of, router_of
from vlmoe_core.moe.routers.cosine import Router


def cosine_of(**values: Any) -> Router:
    router = router_of({"name": "cosine", "dim": 5, **values}, 6, dim=8, train=False)
    assert isinstance(router, Router)
    return router


def test_logits_are_cosines_over_the_temperature() -> None:
    router, x = cosine_of(temperature=0.3).double(), torch.randn(7, 8, dtype=torch.float64)
    logits = router(x).clean_logits_TE
    for t in range(7):
        small = [sum(p * v for p, v in zip(row, x[t].tolist(), strict=True)) for row in router.projection.tolist()]
        for e, expert in enumerate(router.weight.tolist()):
            product = sum(a * b for a, b in zip(small, expert, strict=True))
            cosine = product / math.hypot(*small) / math.hypot(*expert)
            assert logits[t, e].item() == pytest.approx(cosine / router.temperature.item(), rel=1e-9)


def test_only_angles_count() -> None:
    router, x = cosine_of(), torch.randn(9, 8)
    logits = router(x).clean_logits_TE
    torch.testing.assert_close(router(x * 70).clean_logits_TE, logits)
    with torch.no_grad():
        router.weight.mul_(torch.rand(6, 1) + 0.5)
        router.projection.mul_(9)
    torch.testing.assert_close(router(x).clean_logits_TE, logits)
    torch.testing.assert_close(router(-x).clean_logits_TE, -logits)


def test_the_temperature_is_learned_and_never_below_one_hundredth() -> None:
    router, x = cosine_of(temperature=0.5), torch.randn(9, 8)
    warm = router(x).clean_logits_TE
    warm.sum().backward()
    assert router.temperature.grad is not None and router.temperature.grad != 0
    for cold in (0.01, 0.003, -1.0):
        with torch.no_grad():
            router.temperature.fill_(cold)
        torch.testing.assert_close(router(x).clean_logits_TE, warm * 50)
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.01"):
        config_of({"name": "cosine", "temperature": 0.005})


def test_its_gradients() -> None:
    router, x = cosine_of(temperature=0.3).double(), torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    inputs = (x, *router.parameters())

    def logits(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        names = [name for name, _ in router.named_parameters()]
        plan = torch.func.functional_call(router, dict(zip(names, weights, strict=True)), (x,))
        return plan.clean_logits_TE  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(logits, inputs)


def test_a_token_of_zeros_is_routed() -> None:
    plan = cosine_of()(torch.zeros(2, 8))
    assert torch.equal(plan.probs_TE, torch.full((2, 6), 1 / 6))


def test_state_and_counts() -> None:
    router = cosine_of()
    shapes = {name: tuple(p.shape) for name, p in router.named_parameters()}
    assert shapes == {"projection": (5, 8), "weight": (6, 5), "temperature": ()}
    config = router.config.router
    assert config.num_params(8, 6) == sum(p.numel() for p in router.parameters())
    assert config.flops(8, 6) == 2 * 5 * 8 + 2 * 5 * 6
    defaults = router_of("cosine")
    assert isinstance(defaults, Router)
    assert defaults.projection.shape == (16, 8) and defaults.temperature.item() == pytest.approx(0.07)
    assert defaults.config.balance.vloss == 0.01
