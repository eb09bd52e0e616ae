from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe.routers.support import config_of, router_of
from vlmoe_core.moe.routers import softmax
from vlmoe_core.moe.routers.bias_balanced import Router, bias_change


def balanced_of(rate: float = 0.001, num_experts: int = 4, **values: Any) -> Router:
    router = router_of({"name": "bias-balanced", "update_rate": rate}, num_experts, **values)
    assert isinstance(router, Router)
    return router


def test_the_bias_decides_the_choice_and_not_the_weight() -> None:
    router, x = balanced_of(train=False, top_k=2), torch.randn(9, 8)
    plain = router(x)
    rarest = int(plain.probs_TE.mean(0).argmin())
    router.bias[rarest] = 2.0
    plan = router(x)
    assert (plan.expert_TK[:, 0] == rarest).all()
    assert torch.equal(plan.expert_TK[:, 1], plain.probs_TE.index_fill(1, torch.tensor(rarest), -1).argmax(1))
    assert torch.equal(plan.probs_TE, plain.probs_TE)
    assert torch.equal(plan.weight_TK, plain.probs_TE.gather(1, plan.expert_TK))


def test_without_bias_it_is_the_softmax_router() -> None:
    router, plain, x = balanced_of(train=False), router_of(train=False), torch.randn(9, 8)
    assert isinstance(plain, softmax.Router) and torch.equal(router.weight, plain.weight)
    assert torch.equal(router(x).expert_TK, plain(x).expert_TK)


def test_the_update_adds_the_rate_where_too_few_came_and_takes_it_where_too_many() -> None:
    assert bias_change(torch.tensor([5.0, 1.0, 3.0, 3.0]), 0.25).tolist() == [-0.25, 0.25, 0.0, 0.0]
    router = balanced_of(0.25)
    router.update(torch.tensor([5, 1, 3, 3]))
    router.update(torch.tensor([9, 0, 0, 3], dtype=torch.float64))
    assert router.bias.tolist() == [-0.5, 0.5, 0.25, 0.0]
    router.update(torch.zeros(4))
    assert router.bias.tolist() == [-0.5, 0.5, 0.25, 0.0]
    assert router.bias.dtype == torch.float32


def shares(router: Router, x: Tensor) -> Tensor:
    return torch.bincount(router(x).expert_TK.flatten(), minlength=router.config.num_experts) / len(x)


def test_repeated_updates_even_out_a_skewed_stream() -> None:
    router = balanced_of(0.01, 8, train=False)
    torch.manual_seed(1)
    mean = 2 * torch.randn(8)
    with torch.no_grad():
        before = shares(router, mean + torch.randn(512, 8))
        for _ in range(300):
            counts = 512 * shares(router, mean + torch.randn(512, 8))
            router.update(counts)
        after = torch.stack([shares(router, mean + torch.randn(512, 8)) for _ in range(4)]).mean(0)
    assert before.max() > 0.4 and before.min() == 0
    assert after.max() < 2 / 8 and after.min() > 0.5 / 8


def test_the_bias_is_saved_and_has_no_gradient() -> None:
    router = balanced_of(0.5)
    router.update(torch.tensor([1, 0, 0, 0]))
    assert set(router.state_dict()) == {"weight", "bias"}
    assert {name for name, _ in router.named_parameters()} == {"weight"}
    other = balanced_of(0.5)
    other.load_state_dict(router.state_dict())
    assert other.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    router(torch.randn(5, 8)).weight_TK.sum().backward()
    assert router.bias.grad is None and router.weight.grad is not None


def test_it_needs_no_balance_loss_but_may_have_one() -> None:
    assert config_of("bias-balanced").balance.weights == {}
    assert config_of("bias-balanced", balance={"switch": 0.1}).balance.weights == {"switch": 0.1}
    with pytest.raises(ValueError, match="greater than 0"):
        config_of({"name": "bias-balanced", "update_rate": 0})
