import pytest
import torch
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize(("tokens", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_arithmetic_is_never_below_float32(tokens: torch.dtype, expected: torch.dtype) -> None:
    x = torch.randn(6, 8, dtype=tokens)
    router = router_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = router.eval()(x)
    for tensor in (plan.clean_logits_TE, plan.probs_TE, plan.weight_TK):
        assert tensor.dtype == expected
    assert torch.equal(plan.clean_logits_TE, x.to(expected) @ router.weight.to(expected).t())


def test_the_recompute_of_activation_checkpointing_makes_the_same_plan() -> None:
    router, seen = router_of(capacity_factor=0.5), []

    def block(x: torch.Tensor) -> torch.Tensor:
        plan = router(x)
        seen.append(plan)
        return (plan.weight_TK * plan.kept_TK).sum()

    block_input = torch.randn(64, 8, requires_grad=True)
    loss = checkpoint(block, block_input, use_reentrant=False)
    torch.randn(7)
    loss.backward()
    forward, again = seen
    assert forward is not again
    for name in ("expert_TK", "slot_TK", "kept_TK", "noisy_logits_TE", "weight_TK"):
        assert torch.equal(getattr(forward, name), getattr(again, name)), name


def test_state_is_one_weight_without_bias() -> None:
    assert {name: tuple(p.shape) for name, p in router_of().named_parameters()} == {"weight": (4, 8)}
