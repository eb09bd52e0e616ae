"""The operator `vlmoe::expert_ffn` and both of its kernels. Against the plain loop: test_experts.py."""

import logging
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vlmoe_core.moe import by_expert, native, operator
from vlmoe_core.moe.call import Call
from vlmoe_core.moe.operator import expert_ffn

EXPERTS, DIM, HIDDEN = 5, 16, 24


def arguments(
    tokens: int = 12, top_k: int = 2, dropped: int = 5, dtype: torch.dtype = torch.float32, dropout: bool = False
) -> dict[str, Any]:
    """Arguments of the operator: random choices, one expert without any, the last ones dropped."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    choices = tokens * top_k
    ends = torch.randint(0, max(1, choices - dropped) + 1, (EXPERTS,), generator=generator).sort().values
    ends[1] = ends[0]
    ends[-1] = max(0, choices - dropped)
    keep = (torch.rand(choices, HIDDEN, generator=generator) >= 0.4).to(dtype) / 0.6
    return {
        "x_TD": normal(tokens, DIM),
        "weight_TK": torch.rand(tokens, top_k, generator=generator),
        "choice_N": torch.randperm(choices, generator=generator),
        "offsets_E": ends.int(),
        "up_EHD": normal(EXPERTS, HIDDEN, DIM) * 0.3,
        "up_EH": normal(EXPERTS, HIDDEN),
        "down_EDH": normal(EXPERTS, DIM, HIDDEN) * 0.3,
        "down_ED": normal(EXPERTS, DIM),
        "dropout_CH": keep if dropout else None,
        "save": True,
    }


def call_of(values: dict[str, Any]) -> Call:
    names = ("x_TD", "weight_TK", "choice_N", "offsets_E", "up_EHD", "down_EDH", "dropout_CH")
    return Call(**{name: values[name] for name in names})


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_kernel_equals_the_loop_over_experts(dtype: torch.dtype, top_k: int, dropout: bool) -> None:
    # torch's grouped kernel runs on a CPU too; there it only never gets the call.
    values = arguments(tokens=40, top_k=top_k, dtype=dtype, dropout=dropout)
    call, biases = call_of(values), (values["up_EH"], values["down_ED"])
    ours, theirs = (kernel.forward(call, *biases, True) for kernel in (by_expert, native))
    kept = int(values["offsets_E"][-1])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(theirs[0], ours[0], **tolerance)
    for a, b in zip(theirs[1:], ours[1:], strict=True):
        torch.testing.assert_close(a[:kept], b[:kept], **tolerance)
    grad = torch.randn(40, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    for a, b in zip(native.backward(call, grad, *theirs[1:]), by_expert.backward(call, grad, *ours[1:]), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        ({}, True),
        ({"capability": (10, 0)}, True),
        ({"capability": (8, 6)}, False),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float32}, False),
        ({"tokens": 0}, False),
        ({"dim": 12}, False),
        ({"hidden": 20}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_the_native_kernel_gets_what_torch_has_a_kernel_for(
    change: dict[str, Any], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"capability": (9, 0), "dtype": torch.bfloat16, "tokens": 12, "dim": 16, "hidden": 24, "device": "cuda"}
    case |= change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    with FakeTensorMode():
        placed = {"device": case["device"], "dtype": case["dtype"]}
        call = Call(
            torch.empty(case["tokens"], case["dim"], **placed),
            torch.empty(case["tokens"], 1, device=case["device"]),
            torch.empty(case["tokens"], dtype=torch.int64, device=case["device"]),
            torch.empty(5, dtype=torch.int32, device=case["device"]),
            torch.empty(5, case["hidden"], case["dim"], **placed),
            torch.empty(5, case["dim"], case["hidden"], **placed),
            None,
        )
        assert native.serves(call) is serves


@pytest.mark.parametrize("kernel", [by_expert, native])
def test_what_no_backward_needs_is_not_kept(kernel: Any) -> None:
    values = arguments()
    _, before_NH, out_ND = kernel.forward(call_of(values), values["up_EH"], values["down_ED"], False)
    assert before_NH.shape == (0, HIDDEN) and out_ND.shape == (0, DIM)


@pytest.mark.parametrize("dropout", [False, True])
def test_torch_finds_the_operator_sound(dropout: bool) -> None:
    values = arguments(dtype=torch.float64, dropout=dropout)
    values["weight_TK"] = values["weight_TK"].double()
    for name in ("x_TD", "weight_TK", "up_EHD", "up_EH", "down_EDH", "down_ED"):
        values[name].requires_grad_()
    torch.library.opcheck(expert_ffn, tuple(values.values()))


def test_gradients_equal_finite_differences() -> None:
    values = arguments(tokens=4, dropped=3, dtype=torch.float64, dropout=True)
    values["weight_TK"] = values["weight_TK"].double()
    names = ("x_TD", "weight_TK", "up_EHD", "up_EH", "down_EDH", "down_ED")

    def output(*inputs: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = expert_ffn(*(values | dict(zip(names, inputs, strict=True))).values())[0]
        return y

    assert torch.autograd.gradcheck(output, [values[name].requires_grad_() for name in names])


def test_flops_of_forward_and_backward() -> None:
    values = arguments()
    for name in ("x_TD", "up_EHD"):
        values[name].requires_grad_()
    rows = values["choice_N"].shape[0]
    with FlopCounterMode(display=False) as counter:
        y = expert_ffn(*values.values())[0]
    assert counter.get_total_flops() == 4 * rows * DIM * HIDDEN
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 8 * rows * DIM * HIDDEN


def test_dtypes_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"needs one dtype, got torch.float32, torch.float64"):
        expert_ffn(*(arguments() | {"up_EHD": torch.zeros(EXPERTS, HIDDEN, DIM, dtype=torch.float64)}).values())
    with pytest.raises(ValueError, match=r"can't apply experts \(5, 24, 8\) and \(5, 16, 24\) to tokens \(12, 16\)"):
        expert_ffn(*(arguments() | {"up_EHD": torch.zeros(EXPERTS, HIDDEN, 8)}).values())


def test_the_fallback_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    operator._say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        operator._say_fallback("cuda", torch.float32, 20, 16)
        operator._say_fallback("cuda", torch.float32, 20, 16)
    assert [r.message for r in caplog.records] == [
        "torch's grouped matmul does not serve torch.float32, widths 16 and 20, on this cuda device: "
        "one product an expert instead"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("top_k", [1, 2])
def test_both_kernels_on_a_gpu(top_k: int) -> None:
    values = arguments(tokens=300, top_k=top_k, dtype=torch.bfloat16)
    values = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    call, biases = call_of(values), (values["up_EH"], values["down_ED"])
    assert native.serves(call)
    ours, theirs = (kernel.forward(call, *biases, True) for kernel in (by_expert, native))
    grad = torch.randn(300, DIM, device="cuda", dtype=torch.bfloat16)
    backwards = (by_expert.backward(call, grad, *ours[1:]), native.backward(call, grad, *theirs[1:]))
    for a, b in zip((ours[0], *backwards[0]), (theirs[0], *backwards[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_on_a_gpu_are_bit_identical(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        values = arguments(tokens=300, dtype=dtype, dropout=True)
        values = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        values["x_TD"].requires_grad_()
        values["up_EHD"].requires_grad_()
        found = []
        for _ in range(2):
            y = expert_ffn(*values.values())[0]
            found.append([y, *torch.autograd.grad(y.square().sum(), [values["x_TD"], values["up_EHD"]])])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
