"""The comparison of the expert backends with the dense layer of equal FLOPs."""

import importlib.util
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmoe_core.errors import RecipeError, UsageError
from vlmoe_core.moe import bench
from vlmoe_core.moe.bench import Case, Side, compare, dense_layer, inputs, side_of, sparse_layer, take_turns

CASE = Case(16, 32, 4, 24, 2)
ONE = Case(16, 32, 1, 24, 1)


class Recorder(nn.Module):
    """Notes in which state each pass meets it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.met: list[tuple[bool, bool]] = []

    def forward(self, x_TD: Tensor) -> Tensor:
        self.met.append((self.training, self.weight.grad is None and x_TD.grad is None))
        return x_TD * self.weight


def test_every_backend_is_measured_or_has_a_reason() -> None:
    found = compare(CASE, repeats=2)
    names = [one.name for one in (*found.measured, *found.unserved)]
    assert set(names) == {"dense", *bench.BACKENDS} and len(names) == 1 + len(bench.BACKENDS)
    assert [one.name for one in found.measured[:3]] == ["dense", "grouped", "loop"]
    assert all(one.seconds > 0 and one.over_dense > 0 and one.peak_bytes > 0 for one in found.measured)
    assert (found.measured[0].over_dense, found.measured[0].peak_over_dense) == (1, 1)
    assert found.measured[1].peak_over_dense == found.measured[1].peak_bytes / found.measured[0].peak_bytes
    assert all(one.name == "tutel" and one.reason for one in found.unserved)
    assert found.machine.endswith(f"torch {torch.__version__}")


def test_only_the_backends_asked_for_and_each_once() -> None:
    found = compare(CASE, ["loop", "grouped", "loop"], repeats=1)
    assert [one.name for one in found.measured] == ["dense", "loop", "grouped"]


def test_the_peak_of_the_dense_layer_equals_the_count_by_hand() -> None:
    x_TD, grad_TD = inputs(CASE)
    hidden = CASE.hidden * CASE.top_k
    # Before GELU, after it, the gradient of either; and the output, which lives to the end.
    expected = (3 * CASE.tokens * hidden + CASE.tokens * CASE.dim) * 4
    assert side_of(dense_layer(CASE), x_TD, grad_TD).peak() == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_expert_computes_the_dense_layer(dtype: str) -> None:
    case = replace(ONE, dtype=dtype)
    x_TD, _ = inputs(case)
    dense, sparse = dense_layer(case), sparse_layer(case, "grouped")
    for name in ("up", "down"):
        dense.get_submodule(name).weight.data = sparse.experts.get_submodule(name).weight.data[0]
        dense.get_submodule(name).bias.data = sparse.experts.get_submodule(name).bias.data[0]
    torch.testing.assert_close(sparse(x_TD)[0], dense(x_TD))


def test_all_backends_hold_the_same_weights_in_the_dtype_of_the_case_and_drop_nothing() -> None:
    case = replace(CASE, dtype="bfloat16")
    x_TD, grad_TD = inputs(case)
    grouped, loop = sparse_layer(case, "grouped"), sparse_layer(case, "loop")
    for mine, other in zip(grouped.parameters(), loop.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, other)
    _, plan = grouped.train()(x_TD)
    assert bool(plan.kept_TK.all()) and plan.noise_std == 0
    assert x_TD.dtype == grad_TD.dtype == torch.bfloat16 and grad_TD.is_contiguous() and grad_TD.std() > 0.5


def test_making_a_layer_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    inputs(CASE)
    sparse_layer(CASE, "grouped")
    assert torch.equal(torch.get_rng_state(), before)


def test_every_step_starts_in_training_mode_and_without_gradients() -> None:
    layer = Recorder().eval()
    x_TD, grad_TD = inputs(CASE)
    side = side_of(layer, x_TD, grad_TD)
    take_turns({"it": side}, repeats=3)
    side.peak()
    # A look at the output, a first step, a turn to warm up, three that count, and one for the memory.
    assert layer.met == [(True, True)] * 7
    assert layer.weight.grad is None and side.x_TD.grad is None


def test_a_step_computes_all_gradients() -> None:
    x_TD, grad_TD = inputs(CASE)
    side = side_of(sparse_layer(CASE, "grouped"), x_TD, grad_TD)
    side.step()
    assert side.x_TD.grad is not None and all(p.grad is not None for p in side.layer.parameters())


def test_the_incoming_gradient_takes_the_dtype_of_the_output() -> None:
    x_TD, grad_TD = inputs(CASE)
    side = side_of(dense_layer(CASE), x_TD, grad_TD, torch.bfloat16)
    assert side.grad_TD.dtype == torch.bfloat16 and side.layer.get_parameter("up.weight").dtype == torch.float32


def test_sides_take_turns_and_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, grad_TD = inputs(CASE)
    sides = {name: Side(Recorder(), x_TD, grad_TD) for name in "ab"}
    order: list[nn.Module] = []
    said: list[str] = []

    def seconds(side: Side) -> float:
        order.append(side.layer)
        return float(len(order))

    monkeypatch.setattr(Side, "seconds", seconds)
    times = take_turns(sides, 2, said.append)
    assert order == [sides["a"].layer, sides["b"].layer] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert said == ["warming up", "repeat 1 of 2", "repeat 2 of 2"]


def test_ratio_is_the_median_of_each_repeats_own() -> None:
    assert bench.median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]) == 2.0


def test_a_backend_that_does_not_serve_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.sparse_layer

    def refuses(case: Case, backend: Any) -> nn.Module:
        if backend == "grouped":
            raise RecipeError("no kernel for it\nsecond line")
        return real(case, backend)

    monkeypatch.setattr(bench, "sparse_layer", refuses)
    found = compare(CASE, ["grouped", "loop"], repeats=1)
    assert [one.name for one in found.measured] == ["dense", "loop"]
    assert [asdict(one) for one in found.unserved] == [{"name": "grouped", "reason": "no kernel for it"}]


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    found = compare(CASE, ["loop"], repeats=1, threads=before + 1)
    assert found.machine.startswith(f"{before + 1} threads of ")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 5}, r"top_k \(5\) is more than experts \(4\); lower it or add experts"),
        ({"tokens": 0}, "tokens is 0; it must be 1 or more"),
        ({"dtype": "bfloat61"}, r"unknown dtype 'bfloat61'; did you mean 'bfloat16'\?"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: bfloat16, float16, float32, float64"),
        ({"device": "gpu"}, "unknown device 'gpu'; use cpu, cuda or cuda:N"),
        ({"device": "mps"}, "device 'mps' can't be measured"),
        ({"device": "cuda:99"}, r"device 'cuda:99' is not there: CUDA devices found: \d+; use --device cpu"),
    ],
)
def test_what_can_not_be_measured_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(CASE, **wrong)


def test_unknown_and_absent_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'groped'; did you mean 'grouped'\?"):
        compare(CASE, ["groped"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="'tutel' needs the tutel package, which is not installed; 'vlmoe env' says"):
        compare(CASE, ["tutel"])


def test_a_dense_layer_that_can_not_be_computed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> nn.Module:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(bench, "dense_layer", fails)
    with pytest.raises(UsageError, match="the dense layer can't be computed in float32 on cpu: not implemented"):
        compare(CASE)
