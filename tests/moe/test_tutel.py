import importlib.util
import sys
from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmoe_core.errors import RecipeError
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.implementations import loop as specification
from vlmoe_core.moe.implementations.tutel import _kernels, carrier_dtype
from vlmoe_core.moe.implementations.tutel import run as tutel
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.plan import RoutingPlan, capacity_of, make_plan

needs_tutel = pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="the tutel package is absent")

DIM, HIDDEN = 7, 11
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def loop(x: Tensor, plan: RoutingPlan, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> Tensor:
    return specification.run(x, plan, up, down, None)


def plan_of(logits: Tensor, top_k: int = 2, capacity: int | None = None, weights: Any = "gate") -> RoutingPlan:
    return make_plan(logits, logits, top_k=top_k, weights=weights, priority="gate", capacity=capacity, noise_std=0.0)


class Problem:
    """Tokens, a linear router and the experts' weights, all with gradients."""

    def __init__(self, tokens: int, num_experts: int = 5, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.leaves = {
            "x": draw(tokens, DIM),
            "router": draw(DIM, num_experts),
            "up.weight": draw(num_experts, HIDDEN, DIM),
            "up.bias": draw(num_experts, HIDDEN),
            "down.weight": draw(num_experts, DIM, HIDDEN),
            "down.bias": draw(num_experts, DIM),
        }

    def run(self, implementation: Any, grad: Tensor | None = None, **plan: Any) -> dict[str, Tensor]:
        """Output and all gradients."""
        leaves = self.leaves
        x = leaves["x"]
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = x.to(wide) @ leaves["router"].to(wide)
        up, down = ((leaves[f"{name}.weight"], leaves[f"{name}.bias"]) for name in ("up", "down"))
        y = implementation(x, plan_of(logits, **plan), up, down)
        if grad is None:
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        grads = torch.autograd.grad(y, list(leaves.values()), grad)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in wanted:
        tolerance = TOLERANCE[wanted[name].dtype]
        torch.testing.assert_close(
            got[name], wanted[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@needs_tutel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("factor", [None, "1/2", "5/4", "5"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_it_equals_the_loop(top_k: int, factor: str | None, tokens: int, dtype: torch.dtype) -> None:
    problem = Problem(tokens, dtype=dtype)
    capacity = capacity_of(tokens, 5, top_k, None if factor is None else Fraction(factor))
    plan = {"top_k": top_k, "capacity": capacity}
    got = problem.run(tutel, **plan)
    assert got["y"].shape == (tokens, DIM) and got["y"].dtype == dtype
    assert_same(got, problem.run(loop, **plan))


@needs_tutel
@pytest.mark.parametrize("weights", ["gate", "renormalised", "unit"])
@pytest.mark.parametrize("num_experts", [2, 40])
def test_weights_and_empty_experts(weights: str, num_experts: int) -> None:
    problem = Problem(6, num_experts)
    plan = {"top_k": 2, "capacity": 2, "weights": weights}
    assert_same(problem.run(tutel, **plan), problem.run(loop, **plan))


@needs_tutel
@pytest.mark.parametrize("capacity", [None, 3])
def test_all_tokens_to_one_expert(capacity: int | None) -> None:
    problem = Problem(9)
    with torch.no_grad():
        problem.leaves["x"].abs_()
        problem.leaves["router"].zero_()[:, 2] = 1.0
    plan = {"top_k": 1, "capacity": capacity}
    got = problem.run(tutel, **plan)
    assert_same(got, problem.run(loop, **plan))
    assert (got["y"] != 0).any(dim=1).sum() == (9 if capacity is None else 3)


@needs_tutel
def test_expanded_and_non_contiguous_gradients() -> None:
    problem = Problem(9)
    for grad in (torch.tensor(2.0).expand(9, DIM), torch.randn(DIM, 9).t()):
        assert not grad.is_contiguous()
        assert_same(problem.run(tutel, grad, capacity=2), problem.run(loop, grad.contiguous(), capacity=2))


@needs_tutel
@pytest.mark.parametrize("x", [torch.randn(DIM, 9).t(), torch.randn(1, DIM).expand(9, DIM), torch.randn(18, DIM)[::2]])
def test_non_contiguous_input(x: Tensor) -> None:
    problem = Problem(9)
    assert not x.is_contiguous()
    problem.leaves["x"] = x.requires_grad_()
    assert_same(problem.run(tutel), problem.run(loop))


@needs_tutel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_carried_exactly(dtype: torch.dtype) -> None:
    problem = Problem(33, dtype=dtype)
    got, wanted = problem.run(tutel, capacity=9), problem.run(loop, capacity=9)
    for name in wanted:
        assert got[name].dtype == dtype
        scale = wanted[name].abs().max()
        assert (got[name] - wanted[name]).abs().max() < (0.03 if dtype == torch.bfloat16 else 0.004) * scale, name


@needs_tutel
def test_a_call_in_one_dtype_leaves_nothing_for_the_next() -> None:
    for dtype in (torch.float16, torch.float64, torch.float32, torch.bfloat16, torch.float32):
        problem = Problem(12, dtype=dtype)
        got, wanted = problem.run(tutel), problem.run(loop)
        torch.testing.assert_close(got["y"], wanted["y"], rtol=0.03, atol=0.1)


@needs_tutel
def test_tutels_own_caches_are_neither_read_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = importlib.import_module("tutel.impls.fast_dispatch").TutelMoeFastDispatcher
    wrong = torch.full((99, 2), 5.0, dtype=torch.float16)
    monkeypatch.setattr(dispatcher, "ones_helper", wrong)
    monkeypatch.setattr(dispatcher, "kernel_pool", {})
    problem = Problem(9)
    assert_same(problem.run(tutel), problem.run(loop))
    assert dispatcher.ones_helper is wrong
    assert not dispatcher.kernel_pool


@needs_tutel
def test_no_environment_variable_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(33)
    before = problem.run(tutel, capacity=4)
    for name in ("BATCH_PRIO", "CAP_FACTOR", "SKIP_MOE", "SKIP_EXPERT", "SKIP_A2A", "FAST_CUMSUM"):
        monkeypatch.setenv(name, "1")
    after = problem.run(tutel, capacity=4)
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_tutel
def test_dropped_tokens_get_zero_and_their_values_never_matter() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    plan = plan_of(logits, top_k=1, capacity=2)
    dropped = ~plan.kept_TK[:, 0]
    leaves = Problem(20).leaves
    x = leaves["x"].detach().masked_fill(dropped.unsqueeze(1), torch.nan).requires_grad_()
    up, down = ((leaves[f"{name}.weight"], leaves[f"{name}.bias"]) for name in ("up", "down"))
    y = tutel(x, plan, up, down)
    y.sum().backward()
    assert 0 < dropped.sum() < 20
    assert (y[dropped] == 0).all()
    assert (y[~dropped] != 0).any(dim=1).all()
    assert x.grad is not None and (x.grad[dropped] == 0).all()
    assert leaves["up.weight"].grad is not None and leaves["up.weight"].grad.isfinite().all()


@needs_tutel
@pytest.mark.parametrize("capacity", [None, 20])
def test_what_is_kept_decides_whatever_the_slot(capacity: int | None) -> None:
    leaves = Problem(20).leaves
    plan = plan_of((leaves["x"] @ leaves["router"]).detach(), capacity=capacity)
    plan = replace(plan, kept_TK=plan.kept_TK & (torch.arange(40).view(20, 2) % 3 > 0))
    up, down = ((leaves[f"{name}.weight"], leaves[f"{name}.bias"]) for name in ("up", "down"))
    wanted = loop(leaves["x"], plan, up, down)
    torch.testing.assert_close(tutel(leaves["x"], plan, up, down), wanted, rtol=1e-4, atol=1e-4)


@needs_tutel
def test_two_runs_are_bit_identical() -> None:
    problem = Problem(33)
    first, second = problem.run(tutel, capacity=9), problem.run(tutel, capacity=9)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_tutel
def test_a_compiled_caller_gets_the_same() -> None:
    compiled = torch.compile(lambda x, *rest: tutel(x + 1, *rest) - 1, backend="eager", dynamic=True)
    for tokens in (9, 14):
        leaves = Problem(tokens).leaves
        plan = plan_of(leaves["x"] @ leaves["router"], capacity=4)
        up, down = ((leaves[f"{name}.weight"], leaves[f"{name}.bias"]) for name in ("up", "down"))
        assert torch.equal(compiled(leaves["x"], plan, up, down), tutel(leaves["x"] + 1, plan, up, down) - 1)


@needs_tutel
def test_more_numbers_than_32_bits_count_are_refused() -> None:
    leaves = Problem(3).leaves
    plan = plan_of(leaves["x"] @ leaves["router"], capacity=2**31 // (5 * DIM) + 1)
    up, down = ((leaves[f"{name}.weight"], leaves[f"{name}.bias"]) for name in ("up", "down"))
    with pytest.raises(RecipeError, match=r"at most 2\^31 - 1 numbers.*width 7.*use 'experts: grouped'"):
        tutel(leaves["x"], plan, up, down)


@pytest.mark.parametrize("module", ["tutel", "tutel.impls.fast_dispatch"])
def test_absence_is_told(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tutel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=r"experts: tutel needs the package tutel.*use 'experts: grouped'.*README"):
        Problem(3).run(tutel)


@pytest.mark.parametrize(
    ("dtype", "device", "carrier"),
    [
        (torch.float32, "cpu", torch.float32),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.float16, "cuda", torch.float32),
        (torch.float64, "cpu", torch.float64),
    ],
)
def test_carriers_hold_every_value(dtype: torch.dtype, device: str, carrier: torch.dtype) -> None:
    assert carrier_dtype(dtype, device) == carrier
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).tiny, 1 + torch.finfo(dtype).eps):
        number = torch.tensor(value, dtype=dtype)
        assert torch.equal(number.to(carrier).to(dtype), number)


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        (torch.float64, "cuda", "no kernel for float64 on cuda: use 'experts: grouped'"),
        (torch.complex64, "cpu", "no kernel for complex64 on cpu"),
        (torch.float32, "meta", "kernels for cpu and cuda, not for meta"),
    ],
)
def test_what_the_kernels_lack_is_refused(dtype: torch.dtype, device: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        carrier_dtype(dtype, device)


def test_a_tutel_without_gpu_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tutel_custom_kernel", ModuleType("tutel_custom_kernel"))
    _kernels.cache_clear()
    with pytest.raises(RecipeError, match="without its GPU kernels: use 'experts: grouped'"):
        _kernels(torch.float32, True)


@needs_tutel
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_layer_takes_it_by_its_word(precision: torch.dtype) -> None:
    found = {}
    for word in ("tutel", "loop"):
        torch.manual_seed(0)
        config = MoEConfig.model_validate({"num_experts": 5, "top_k": 2, "capacity_factor": 0.75, "experts": word})
        layer = SparseFFN(DIM, HIDDEN, config, init_std=0.5)
        x = torch.randn(40, DIM)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            y = layer(x)[0]
        assert y.dtype == precision
        grads = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
        found[word] = {"y": y.detach(), **dict(zip(dict(layer.named_parameters()), grads, strict=True))}
    tolerance = 1e-4 if precision == torch.float32 else 0.02
    for name, wanted in found["loop"].items():
        assert (found["tutel"][name] - wanted).abs().max() <= tolerance * wanted.abs().max(), name
