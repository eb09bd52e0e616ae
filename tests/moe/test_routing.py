"""What holds for every router: its plan is the specification's, its arithmetic float32, its noise from torch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.moe.reference import (
    brute_force_capacity,
    brute_force_choice,
    brute_force_slots,
    brute_force_walk,
    walk_that_explains,
)
from tests.moe.routers.support import ALL, BASELINES, LEARNING, config_of, identities, router_of
from vlmoe_core.config import plugin_names
from vlmoe_core.moe.config import ROUTERS, MoEConfig
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.losses import balance_loss
from vlmoe_core.moe.plan import RoutingPlan
from vlmoe_core.moe.routing import TopKRouter

FACTORS = [None, "0.25", "0.5", "1.0", "1.1", "2.0"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], int, int, torch.dtype]:
    """Config, tokens, seed, dtype of the tokens."""
    experts = draw(st.integers(1, 64))
    top_k = draw(st.integers(1, min(4, experts)))
    factor = draw(st.sampled_from(FACTORS))
    values = {
        "num_experts": experts,
        "top_k": top_k,
        "capacity_factor": None if factor is None else float(factor),
        "priority": draw(st.sampled_from(["gate", "position", "random"])),
        "weights": draw(st.sampled_from(["gate", "unit", "renormalised"] if top_k > 1 else ["gate", "unit"])),
        "noise": draw(st.sampled_from([1.0, 5.0])),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return values, draw(st.sampled_from([0, 1, 2, 5, 33])), draw(st.integers(0, 10**6)), dtype


def brute_force_weights(probs: list[list[float]], chosen: list[list[int]], weights: str) -> list[list[float]]:
    rows = [[row[e] for e in experts] for row, experts in zip(probs, chosen, strict=True)]
    if weights == "unit":
        return [[1.0 for _ in row] for row in rows]
    return [[gate / sum(row) for gate in row] for row in rows] if weights == "renormalised" else rows


def tokens_of(tokens: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_plan(router: TopKRouter, plan: RoutingPlan, factor: float | None) -> None:
    config = router.config
    tokens, top_k = plan.expert_TK.shape
    written = None if factor is None else str(factor)
    assert plan.capacity == brute_force_capacity(tokens, config.num_experts, top_k, written)
    bias = router.choice_bias()
    scores = plan.probs_TE if bias is None else plan.probs_TE + bias
    chosen, probs = brute_force_choice(scores.tolist(), top_k), plan.probs_TE.tolist()
    assert plan.expert_TK.tolist() == chosen
    assert all(len(set(row)) == top_k for row in chosen)
    slots = plan.slot_TK.tolist()
    walk = (
        walk_that_explains(chosen, slots) if config.priority == "random" else brute_force_walk(probs, config.priority)
    )
    assert (slots, plan.kept_TK.tolist()) == brute_force_slots(chosen, walk, top_k, plan.capacity)
    wanted = torch.tensor(brute_force_weights(probs, chosen, config.weights)).view(tokens, top_k)
    torch.testing.assert_close(plan.weight_TK.float(), wanted)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_plans_of_every_router_equal_the_double_loop(
    name: str, case: tuple[dict[str, Any], int, int, torch.dtype]
) -> None:
    values, tokens, seed, dtype = case
    router = router_of(name, seed=seed, **values)
    if name == "bias-balanced":
        router.get_buffer("bias").normal_(std=0.1)
    x, identity = tokens_of(tokens, seed, dtype), identities(tokens, seed)
    for train in (True, False):
        torch.manual_seed(seed)
        plan = router.train(train)(x, identity)
        check_plan(router, plan, values["capacity_factor"] if train else None)
        assert plan.noise_std == (values["noise"] / values["num_experts"] if train and name in LEARNING else 0)
        assert torch.equal(plan.noisy_logits_TE, plan.clean_logits_TE) == (plan.noise_std == 0 or tokens == 0)
        torch.testing.assert_close(plan.probs_TE, plan.noisy_logits_TE.softmax(1), rtol=0, atol=0)
        torch.manual_seed(seed)
        again = router(x, identity)
        assert all(torch.equal(getattr(plan, f), getattr(again, f)) for f in ("expert_TK", "slot_TK", "weight_TK"))


def test_the_routers_are_the_files_of_the_folder() -> None:
    assert plugin_names(ROUTERS.package) == sorted(ALL)
    assert {name: config_of(name).router.learns for name in ALL} == {n: n in LEARNING for n in ALL}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("tokens", "wanted"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_arithmetic_is_never_below_float32(name: str, tokens: torch.dtype, wanted: torch.dtype) -> None:
    x, router = torch.randn(6, 8).to(tokens), router_of(name, train=False, top_k=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        plan = router(x, identities(6))
    for tensor in (plan.clean_logits_TE, plan.probs_TE, plan.weight_TK):
        assert tensor.dtype == wanted
    torch.manual_seed(0)
    assert torch.equal(plan.clean_logits_TE, router(x, identities(6)).clean_logits_TE)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_no_parameters_and_gates_of_one_over_k(name: str) -> None:
    router = router_of(name, 6, top_k=3, priority="position")
    plan = router(torch.randn(7, 8), identities(7))
    assert not list(router.parameters()) and not router.state_dict()
    assert plan.noise_std == 0
    torch.testing.assert_close(plan.weight_TK, torch.full((7, 3), 1 / 3))
    assert (plan.probs_TE > 0).sum(1).tolist() == [3] * 7


@pytest.mark.parametrize("name", ALL)
def test_the_recompute_of_activation_checkpointing_makes_the_same_plan(name: str) -> None:
    router, seen = router_of(name, capacity_factor=0.5, priority="random", top_k=2), []

    def block(x: Tensor) -> Tensor:
        plan = router(x, identities(64))
        seen.append(plan)
        return (plan.weight_TK * plan.kept_TK * x[:, :1]).sum()

    loss = checkpoint(block, torch.randn(64, 8, requires_grad=True), use_reentrant=False)
    torch.randn(7)
    loss.backward()
    forward, again = seen
    assert forward is not again
    for field in ("expert_TK", "slot_TK", "kept_TK", "noisy_logits_TE", "weight_TK"):
        assert torch.equal(getattr(forward, field), getattr(again, field)), field


def layer_of(name: str, **values: Any) -> SparseFFN:
    torch.manual_seed(0)
    return SparseFFN(8, 16, config_of(name, top_k=2, eval_capacity_factor=0.75, **values), init_std=0.3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens", [0, 1, 24])
def test_meta(name: str, tokens: int) -> None:
    with torch.device("meta"):
        layer = layer_of(name, shared_expert=True)
        x = torch.empty(tokens, 8, requires_grad=True)
        y, plan = layer(x, torch.empty(tokens, dtype=torch.int64))
    (y.sum() + balance_loss(plan, layer.router.config.balance)).backward()  # type: ignore[union-attr, arg-type]
    assert y.shape == x.shape and x.grad is not None
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("name", ALL)
def test_compile_without_graph_break(name: str) -> None:
    torch.compiler.reset()  # torch counts compilations of a function over all its modules, and gives up after eight
    layer = layer_of(name).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(module: Any, x: Tensor) -> list[Tensor]:
        layer.zero_grad()
        torch.manual_seed(2)
        y, plan = module(x, identities(len(x)))
        (y.square().sum() + plan.weight_TK.sum()).backward()
        assert len([p for p in layer.parameters() if p.grad is not None]) == len(list(layer.parameters()))
        return [
            y,
            plan.expert_TK,
            plan.slot_TK,
            plan.weight_TK,
            *(p.grad.clone() for p in layer.parameters() if p.grad is not None),
        ]

    for tokens in (24, 9):
        x = torch.randn(tokens, 8)
        for got, wanted in zip(run(compiled, x), run(layer, x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_export_with_any_number_of_tokens(name: str) -> None:
    layer, tokens = layer_of(name).eval(), torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(
        layer, (torch.randn(24, 8), identities(24)), dynamic_shapes=({0: tokens}, {0: tokens})
    )
    for n in (5, 100):
        x = torch.randn(n, 8)
        torch.manual_seed(n)
        y, plan = program.module()(x, identities(n))
        torch.manual_seed(n)
        wanted, wanted_plan = layer(x, identities(n))
        torch.testing.assert_close(y, wanted)
        assert torch.equal(plan.kept_TK, wanted_plan.kept_TK)
        assert plan.capacity == wanted_plan.capacity


def test_a_router_of_one_expert_gives_every_token_its_gate_of_one() -> None:
    for name in ALL:
        plan = router_of(name, 1)(torch.randn(5, 8), identities(5))
        assert plan.expert_TK.tolist() == [[0]] * 5
        assert plan.weight_TK.tolist() == [[1.0]] * 5
    assert MoEConfig.model_validate({"num_experts": 1}).top_k == 1
