from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.experts import Experts
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.order import order_of


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """torch.empty holds NaN: torch fills uninitialised memory so in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def layer_of(dtype: torch.dtype = torch.float32, dim: int = 10, hidden: int = 14, **config: Any) -> SparseFFN:
    torch.manual_seed(0)
    layer = SparseFFN(dim, hidden, MoEConfig.model_validate({"num_experts": 5, **config}), init_std=0.5).to(dtype)
    with torch.no_grad():
        layer.experts.up.bias.normal_()
        layer.experts.down.bias.normal_()
    return layer


def twin(layer: SparseFFN) -> SparseFFN:
    """The same layer computed by the specification."""
    config = layer.router.config.model_copy(update={"experts": "loop"})
    up = layer.experts.up.weight
    other = SparseFFN(up.shape[2], up.shape[1], config, init_std=0.5).to(up.dtype)
    other.load_state_dict(layer.state_dict())
    return other


def run(layer: SparseFFN, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, and the gradient of the input and of every parameter."""
    x = x.detach().requires_grad_()
    torch.manual_seed(7)
    y, plan = layer(x)
    y.backward(grad.to(y.dtype) if grad.dtype != y.dtype else grad)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, "expert": plan.expert_TK}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


CONFIGS: list[dict[str, Any]] = [
    {"capacity_factor": None},
    {"capacity_factor": 0.5},
    {"top_k": 3, "capacity_factor": 0.5},
    {"top_k": 4, "capacity_factor": None, "weights": "renormalised"},
    {"top_k": 2, "num_experts": 9, "weights": "unit", "priority": "position"},
    {"num_experts": 1, "capacity_factor": None},
]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_equals_loop(config: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    layer = layer_of(dtype, **config)
    x, grad = torch.randn(tokens, 10, dtype=dtype), torch.randn(tokens, 10, dtype=dtype)
    got, wanted = run(layer, x, grad), run(twin(layer), x, grad)
    assert got.keys() == wanted.keys()
    assert "router.weight" in got
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("copies", [False, True])
def test_grouped_equals_loop_in_bfloat16_under_autocast(copies: bool) -> None:
    layer = layer_of(top_k=2, capacity_factor=0.75)
    x, grad = torch.randn(70, 10), torch.randn(70, 10)
    wanted = run(twin(layer), x, grad)
    if copies:
        layer.experts.hold_copies(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(layer, x, grad)
        other = run(twin(layer), x, grad)
    assert got["y"].dtype == torch.bfloat16
    assert torch.equal(got["expert"], wanted["expert"])
    for name in wanted.keys() - {"expert"}:
        scale = wanted[name].abs().max()
        assert (got[name] - wanted[name]).abs().max() < 0.02 * scale, name
        assert (got[name] - other[name]).abs().max() < 0.02 * scale, name
        if name != "y":
            assert got[name].dtype == torch.float32


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
def test_expanded_and_non_contiguous_gradients(implementation: str) -> None:
    layer = layer_of(torch.float64, top_k=2, capacity_factor=0.5, experts=implementation)
    x = torch.randn(9, 10, dtype=torch.float64)
    for grad in (torch.tensor(2.0, dtype=torch.float64).expand(9, 10), torch.randn(10, 9, dtype=torch.float64).t()):
        layer.zero_grad()
        got = run(layer, x, grad)
        layer.zero_grad()
        wanted = run(layer, x, grad.contiguous())
        for name in got:
            torch.testing.assert_close(got[name], wanted[name])


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
def test_one_expert_is_the_dense_layer(implementation: str) -> None:
    layer = layer_of(torch.float64, num_experts=1, capacity_factor=None, experts=implementation)
    x = torch.randn(12, 10, dtype=torch.float64)
    up, down = layer.experts.up, layer.experts.down
    dense = F.linear(F.gelu(F.linear(x, up.weight[0], up.bias[0])), down.weight[0], down.bias[0])
    y, plan = layer(x)
    assert torch.equal(plan.weight_TK, torch.ones_like(plan.weight_TK))
    torch.testing.assert_close(y, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
def test_a_dropped_token_gets_exactly_zero(implementation: str) -> None:
    layer = layer_of(capacity_factor=0.4, experts=implementation)
    x = torch.randn(50, 10, requires_grad=True)
    y, plan = layer(x)
    dropped = ~plan.kept_TK[:, 0]
    assert 0 < dropped.sum() < 50
    assert (y[dropped] == 0).all()
    assert (y[~dropped] != 0).any(dim=1).all()
    # Neither its own value nor its weight can matter, be they not a number.
    wrong = replace(plan, weight_TK=plan.weight_TK.masked_fill(~plan.kept_TK, torch.nan))
    x_TD = x.detach().masked_fill(dropped.unsqueeze(1), torch.nan)
    assert torch.equal(layer.experts(x_TD, wrong), y)
    y.sum().backward()
    assert x.grad is not None and (x.grad[dropped] == 0).all()


def test_every_kept_choice_is_computed_once_and_no_dropped_one() -> None:
    plan = layer_of(top_k=2, capacity_factor=0.5).router(torch.randn(40, 10))
    order = order_of(plan)
    assert sorted(order.choice_N.tolist()) == list(range(80))
    bounds = [0, *order.offsets_E.tolist()]
    assert bounds[-1] == plan.kept_TK.sum()
    for e in range(plan.num_experts):
        rows = order.choice_N[bounds[e] : bounds[e + 1]]
        assert rows.tolist() == [i for i in range(80) if plan.expert_TK.view(-1)[i] == e and plan.kept_TK.view(-1)[i]]


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_every_kept_choice_is_added_once_with_its_weight(implementation: str, capacity_factor: float | None) -> None:
    config = {"num_experts": 6, "top_k": 3, "capacity_factor": capacity_factor, "experts": implementation}
    layer = layer_of(torch.float64, dim=6, **config)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.zero_()
        layer.experts.down.bias.copy_(torch.eye(6))  # expert e answers with the unit vector e
    y, plan = layer(torch.randn(50, 6, dtype=torch.float64))
    expected = [[0.0] * 6 for _ in range(50)]
    for token in range(50):
        for choice in range(3):
            if plan.kept_TK[token, choice]:
                expected[token][int(plan.expert_TK[token, choice])] += float(plan.weight_TK[token, choice])
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_two_runs_of_one_seed_are_bit_identical() -> None:
    layer, x = layer_of(top_k=2), torch.randn(64, 10)
    first = run(layer, x, torch.ones(64, 10))
    layer.zero_grad()
    second = run(layer, x, torch.ones(64, 10))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_experts_start_different_and_without_bias() -> None:
    experts = Experts(4, 64, 128, init_std=0.02)
    for linear in (experts.up, experts.down):
        assert (linear.bias == 0).all()
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not torch.equal(linear.weight[0], linear.weight[1])


def test_copies_are_used_refreshed_and_not_saved() -> None:
    layer = layer_of(capacity_factor=None, noise=0.0, balance={"vloss": 0})
    x = torch.randn(8, 10)
    keys = layer.state_dict().keys()
    layer.experts.hold_copies(torch.bfloat16)
    assert layer.state_dict().keys() == keys
    assert layer.experts.up.copy is not None and layer.experts.up.copy.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)[0]
        with torch.no_grad():
            layer.experts.down.weight.zero_()
        assert torch.equal(layer(x)[0], before)
        layer.experts.refresh_copies()
        assert not torch.equal(layer(x)[0], before)
    # Without autocast the masters serve.
    assert layer(x)[0].dtype == torch.float32
    layer.experts.hold_copies(None)
    assert layer.experts.up.copy is None


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    layer = layer_of(capacity_factor=None, noise=0.0, balance={"vloss": 0})
    layer.experts.hold_copies(torch.bfloat16)
    big, small = torch.randn(8, 10), torch.randn(8, 10)

    def gradient(*micro: tuple[torch.Tensor, float]) -> torch.Tensor:
        layer.zero_grad()
        for x, scale in micro:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, _ = layer(x)
            (y.float().sum() * scale).backward()
        assert layer.experts.up.weight.grad is not None
        return layer.experts.up.weight.grad.clone()

    # A bfloat16 sum would lose the second term, 2^-10 of the first.
    both = gradient((big, 1.0), (small, 2.0**-10))
    assert torch.equal(both, gradient((big, 1.0)) + gradient((small, 2.0**-10)))
    assert both.dtype == torch.float32


def test_whole_module_in_bfloat16() -> None:
    layer = layer_of(torch.bfloat16, capacity_factor=None)
    y, plan = layer(torch.randn(8, 10, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert plan.probs_TE.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 19])
@pytest.mark.parametrize("capacity_factor", [None, 0.6])
def test_grouped_and_loop_give_the_same_bits(top_k: int, capacity_factor: float | None) -> None:
    factors = {"capacity_factor": capacity_factor, "eval_capacity_factor": capacity_factor}
    layer = layer_of(dim=32, hidden=48, num_experts=20, top_k=top_k, **factors).eval()
    x = torch.randn(41, 32)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], twin(layer).eval()(x)[0])
