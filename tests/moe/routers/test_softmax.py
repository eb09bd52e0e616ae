import pytest
import torch

from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.routers.softmax import Router


def router_of(train: bool = True, **config: object) -> Router:
    torch.manual_seed(0)
    return Router(8, MoEConfig.model_validate({"num_experts": 4, **config}), init_std=0.5).train(train)


def test_evaluation_has_no_noise_and_its_own_capacity() -> None:
    x = torch.randn(16, 8)
    router = router_of(capacity_factor=1.25, eval_capacity_factor=2.0)
    assert router(x).capacity == 5
    plan = router.eval()(x)
    assert plan.capacity == 8
    assert plan.noise_std == 0
    assert torch.equal(plan.noisy_logits_TE, plan.clean_logits_TE)
    torch.testing.assert_close(plan.probs_TE, (x @ router.weight.t()).softmax(-1))


def test_dropless_is_the_default_of_evaluation() -> None:
    plan = router_of(train=False)(torch.zeros(16, 8))
    assert plan.capacity is None
    assert plan.kept_TK.all()


def test_noise_has_the_standard_deviation_one_over_experts() -> None:
    plan = router_of()(torch.randn(20000, 8))
    noise = plan.noisy_logits_TE - plan.clean_logits_TE
    assert plan.noise_std == 0.25
    assert noise.std().item() == pytest.approx(0.25, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    torch.testing.assert_close(plan.probs_TE, plan.noisy_logits_TE.softmax(-1))


def test_noise_comes_from_the_default_generator() -> None:
    router, x = router_of(), torch.randn(5, 8)
    torch.manual_seed(3)
    first = router(x).noisy_logits_TE
    second = router(x).noisy_logits_TE
    torch.manual_seed(3)
    assert torch.equal(router(x).noisy_logits_TE, first)
    assert not torch.equal(first, second)


def test_state_is_one_weight_without_bias() -> None:
    assert {name: tuple(p.shape) for name, p in router_of().named_parameters()} == {"weight": (4, 8)}
