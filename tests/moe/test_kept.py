"""Layers that lost experts, against a double loop over tokens and experts of the whole layer."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.moe.reference import brute_force_capacity, brute_force_choice, brute_force_slots, brute_force_walk
from tests.moe.test_config import mistakes, read
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.losses import balance_loss
from vlmoe_core.moe.plan import make_plan

DIM, HIDDEN, EXPERTS, TOKENS = 6, 10, 5, 37
KEPT = (0, 2, 3)


def layers_of(kept: tuple[int, ...] | None = KEPT, **values: Any) -> tuple[SparseFFN, SparseFFN]:
    """A whole layer and the same one with some of its experts, in float64 and evaluation."""
    torch.manual_seed(0)
    config = MoEConfig.model_validate({"num_experts": EXPERTS, **values})
    whole = SparseFFN(DIM, HIDDEN, config, init_std=0.5).double().eval()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    less = SparseFFN(DIM, HIDDEN, config, init_std=0.5, kept=kept).double().eval()
    ids = list(range(EXPERTS)) if kept is None else list(kept)
    state = whole.state_dict()
    less.load_state_dict({name: t[ids] if name.startswith("experts.") else t for name, t in state.items()})
    return whole, less


def expert_of(whole: SparseFFN, expert: int, x_D: Tensor) -> Tensor:
    up, down = whole.experts.up, whole.experts.down
    hidden = F.gelu(up.weight[expert] @ x_D + up.bias[expert])
    return down.weight[expert] @ hidden + down.bias[expert]


def oracle(
    whole: SparseFFN, x_TD: Tensor, kept: tuple[int, ...], removed: str
) -> tuple[list[list[int]], list[list[bool]], Tensor]:
    """Experts and kept of every choice, and the output: token by token, choice by choice."""
    config = whole.router.config
    gates = (x_TD @ whole.router.weight.T).softmax(-1)
    rows = gates.tolist()
    scores = [[g if removed == "drop" or e in kept else -1.0 for e, g in enumerate(row)] for row in rows]
    chosen = brute_force_choice(scores, config.top_k)
    factor = config.eval_capacity_factor
    capacity = brute_force_capacity(len(rows), EXPERTS, config.top_k, None if factor is None else str(factor))
    walk = brute_force_walk(rows, "gate")
    _, fits = brute_force_slots(chosen, walk, config.top_k, capacity)
    computed = [[fits[t][k] and e in kept for k, e in enumerate(row)] for t, row in enumerate(chosen)]
    y_TD = torch.zeros_like(x_TD)
    for t, row in enumerate(chosen):
        total = sum(rows[t][e] for e in row)
        for k, e in enumerate(row):
            if computed[t][k]:
                weight = rows[t][e] / (total if config.weights == "renormalised" else 1)
                y_TD[t] += weight * expert_of(whole, e, x_TD[t])
    return chosen, computed, y_TD


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("factor", [None, 0.6])
@pytest.mark.parametrize(("top_k", "weights"), [(1, "gate"), (2, "gate"), (2, "renormalised")])
@pytest.mark.parametrize("removed", ["next", "drop"])
def test_against_a_double_loop(removed: str, top_k: int, weights: str, factor: float | None, experts: str) -> None:
    values = {"top_k": top_k, "weights": weights, "eval_capacity_factor": factor, "removed": removed}
    whole, less = layers_of(experts=experts, **values)
    x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64)
    y_TD, plan = less(x_TD)
    chosen, computed, wanted_TD = oracle(whole, x_TD, KEPT, removed)
    assert plan.expert_TK.tolist() == chosen
    assert plan.kept_TK.tolist() == computed
    torch.testing.assert_close(y_TD, wanted_TD)
    assert plan.num_experts == EXPERTS
    lost = sum(e not in KEPT for row in chosen for e in row)
    assert lost == 0 if removed == "next" else lost > 0


@pytest.mark.parametrize("removed", ["next", "drop"])
@pytest.mark.parametrize("kept", [None, tuple(range(EXPERTS))])
@pytest.mark.parametrize("factor", [None, 0.6])
def test_with_every_expert_kept_nothing_changes_by_a_bit(
    removed: str, kept: tuple[int, ...] | None, factor: float | None
) -> None:
    whole, less = layers_of(kept, removed=removed, top_k=2, eval_capacity_factor=factor)
    whole, less = whole.float(), less.float()
    x_TD = torch.randn(TOKENS, DIM)
    (wanted, before), (y, plan) = whole(x_TD), less(x_TD)
    assert torch.equal(y, wanted)
    for name in ("expert_TK", "weight_TK", "slot_TK", "kept_TK", "probs_TE", "clean_logits_TE"):
        assert torch.equal(getattr(plan, name), getattr(before, name))


@pytest.mark.parametrize("removed", ["next", "drop"])
def test_gates_are_those_of_the_whole_model(removed: str) -> None:
    whole, less = layers_of(removed=removed, top_k=2)
    x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64)
    (_, before), (_, plan) = whole(x_TD), less(x_TD)
    assert torch.equal(plan.probs_TE, before.probs_TE)
    assert torch.equal(plan.weight_TK, before.probs_TE.gather(1, plan.expert_TK))
    same_T = torch.isin(before.expert_TK, torch.tensor(KEPT)).all(1)
    assert 0 < same_T.sum() < TOKENS
    assert torch.equal(plan.expert_TK[same_T], before.expert_TK[same_T])


def test_the_bias_of_a_choice_counts_among_those_that_are_there() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    bias = torch.tensor([0.0, 0.0, 0.0, 0.15])
    given: dict[str, Any] = {"top_k": 1, "weights": "gate", "priority": "gate", "capacity": None, "noise_std": 0.0}
    plan = make_plan(logits, logits, **given, choice_bias_E=bias, kept=(2, 3))
    assert plan.expert_TK.tolist() == [[3]] and plan.weight_TK.item() == pytest.approx(0.1)
    dropped = make_plan(logits, logits, **given, choice_bias_E=bias, kept=(2, 3), removed="drop")
    assert dropped.expert_TK.tolist() == [[0]] and dropped.kept_TK.tolist() == [[False]]


def test_the_state_holds_the_kept_experts_and_all_rows_of_the_router() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in layers_of()[1].state_dict().items()}
    assert shapes == {
        "router.weight": (EXPERTS, DIM),
        "experts.up.weight": (3, HIDDEN, DIM),
        "experts.up.bias": (3, HIDDEN),
        "experts.down.weight": (3, DIM, HIDDEN),
        "experts.down.bias": (3, DIM),
    }


@pytest.mark.parametrize("removed", ["next", "drop"])
@pytest.mark.parametrize("experts", ["grouped", "loop"])
def test_it_still_trains(removed: str, experts: str) -> None:
    layer = layers_of(removed=removed, top_k=2, experts=experts, capacity_factor=None)[1].train()
    y_TD, plan = layer(torch.randn(TOKENS, DIM, dtype=torch.float64))
    (y_TD.square().sum() + balance_loss(plan, layer.router.config.balance)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("removed", ["next", "drop"])
def test_export_and_meta(removed: str) -> None:
    layer = layers_of(removed=removed, top_k=2, eval_capacity_factor=0.75)[1].float()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(24, DIM),), dynamic_shapes=({0: tokens},))
    x_TD = torch.randn(11, DIM)
    (y, plan), (wanted, before) = program.module()(x_TD), layer(x_TD)
    torch.testing.assert_close(y, wanted)
    assert torch.equal(plan.kept_TK, before.kept_TK) and torch.equal(plan.expert_TK, before.expert_TK)
    assert layer.to("meta")(torch.empty(4, DIM, device="meta"))[0].shape == (4, DIM)


def test_a_recipe_says_it() -> None:
    text = "moe: {num_experts: 4, top_k: 2, kept_experts: {1: [0, 3], 5: [1, 2, 3]}, removed: drop}"
    moe = read(text).moe
    assert moe.kept(1) == (0, 3) and moe.kept(0) is None
    assert (moe.num_kept(1), moe.num_kept(5), moe.num_kept(0)) == (2, 3, 4)
    assert moe == MoEConfig.model_validate(moe.model_dump()) == MoEConfig.model_validate_json(moe.model_dump_json())
    default = MoEConfig(num_experts=4)
    assert (default.kept_experts, default.removed, default.num_kept(1)) == (None, "next", 4)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("{1: [3, 0]}", r"kept_experts of block 1 \(\[3, 0\]\) must be distinct experts from 0 to 3, the lowest first"),
        ("{1: [0, 0, 1]}", "must be distinct experts"),
        ("{1: [0, 4]}", "must be distinct experts"),
        ("{1: [2]}", r"kept_experts of block 1 are 1, fewer than top_k \(2\)"),
    ],
)
def test_refusals(kept: str, message: str) -> None:
    told = mistakes(f"moe: {{num_experts: 4, top_k: 2, kept_experts: {kept}}}")
    assert re.search(message, told), told
