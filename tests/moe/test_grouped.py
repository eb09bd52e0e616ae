import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmoe_core.moe import grouped
from vlmoe_core.moe.grouped import group_sum, grouped_mm

SIZES = [[3, 0, 5, 1], [0, 0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 9], [2, 2, 2, 2]]


def offsets_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def operands(sizes: list[int], extra: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    rows, experts = sum(sizes) + extra, len(sizes)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return random(rows, 4), random(experts, 4, 6), random(experts, 6)


def rows_by_loop(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    parts, start = [], 0
    for e, size in enumerate(sizes):
        parts.append(a[start : start + size] @ b[e] + bias[e])
        start += size
    return torch.cat([*parts, a.new_zeros(a.shape[0] - start, b.shape[2])])


def blocks_by_loop(a: torch.Tensor, b: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    parts, start = [], 0
    for size in sizes:
        parts.append(a[:, start : start + size] @ b[start : start + size])
        start += size
    return torch.stack(parts)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_form_and_its_gradients_equal_the_loop(sizes: list[int], extra: int, dtype: torch.dtype) -> None:
    a, b, bias = operands(sizes, extra, dtype)
    got = grouped_mm(a, b, offsets_of(sizes), bias)
    wanted = rows_by_loop(a, b, bias, sizes)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(got, (a, b, bias), grad), torch.autograd.grad(wanted, (a, b, bias), grad), **tolerance
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_form_and_its_gradients_equal_the_loop(sizes: list[int]) -> None:
    a, _, _ = operands(sizes, 2)
    b = torch.randn(a.shape[0], 5, dtype=a.dtype, requires_grad=True)
    got = grouped_mm(a.t(), b, offsets_of(sizes), None)
    wanted = blocks_by_loop(a.t(), b, sizes)
    grad = torch.randn_like(got)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, (a, b), grad), torch.autograd.grad(wanted, (a, b), grad))


@pytest.mark.parametrize("extra", [0, 2])
def test_rows_of_no_group_are_zero_forward_and_backward(extra: int) -> None:
    sizes = [2, 0, 1]
    a, b, bias = operands(sizes, extra)
    with torch.no_grad():
        a[3:] = float("nan")
    out = grouped_mm(a, b, offsets_of(sizes), bias)
    grad = torch.full_like(out, float("inf"))
    grad[:3] = 1.0
    grads = torch.autograd.grad(out, (a, b, bias), grad)
    assert torch.equal(out[3:], torch.zeros(extra, 6, dtype=out.dtype))
    assert torch.equal(grads[0][3:], torch.zeros(extra, 4, dtype=out.dtype))
    assert all(torch.isfinite(g).all() for g in grads)


def test_gradcheck() -> None:
    sizes = [2, 0, 3]
    a, b, bias = operands(sizes, 1)
    c = torch.randn_like(a, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: grouped_mm(t[0], t[1], offsets_of(sizes), t[2]), (a, b, bias))
    assert torch.autograd.gradcheck(lambda *t: grouped_mm(t[0].t(), t[1], offsets_of(sizes), None), (a, c))
    assert torch.autograd.gradgradcheck(lambda *t: grouped_mm(t[0], t[1], offsets_of(sizes), t[2]), (a, b, bias))


def test_opcheck() -> None:
    a, b, bias = operands([2, 0, 3], 1, torch.float32)
    torch.library.opcheck(grouped_mm, (a, b, offsets_of([2, 0, 3]), bias))
    torch.library.opcheck(grouped_mm, (a.t(), a.detach().clone().requires_grad_(), offsets_of([2, 0, 3]), None))


def test_expanded_and_non_contiguous_gradients() -> None:
    sizes = [3, 0, 5, 1]
    a, b, bias = operands(sizes, 1)
    out = grouped_mm(a, b, offsets_of(sizes), bias)
    wanted = rows_by_loop(a, b, bias, sizes)
    odd = [torch.tensor(1.5, dtype=out.dtype).expand_as(out), torch.randn(6, 10, dtype=out.dtype).t()]
    for grad in odd:
        torch.testing.assert_close(
            torch.autograd.grad(out, (a, b, bias), grad, retain_graph=True),
            torch.autograd.grad(wanted, (a, b, bias), grad, retain_graph=True),
        )


def test_the_weight_gradient_has_the_layout_of_the_weight() -> None:
    # Else every step would copy the gradients of all experts.
    weight = torch.randn(3, 6, 4, requires_grad=True)
    grouped_mm(torch.randn(5, 4), weight.transpose(1, 2), offsets_of([2, 0, 3]), None).sum().backward()
    assert weight.grad is not None and weight.grad.is_contiguous()


def test_low_precision_on_a_cpu_sees_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    plain = torch.mm

    def watched(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.add(a.shape[0])
        return plain(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    a, b, _ = operands([1, 17, 31, 33], 0, torch.bfloat16)
    grouped_mm(a, b, offsets_of([1, 17, 31, 33]), None)
    assert seen == {32, 64}


def test_group_sum() -> None:
    rows = torch.arange(10.0).view(5, 2)
    assert group_sum(rows, offsets_of([2, 0, 2])).tolist() == [[2, 4], [0, 0], [10, 12]]


def test_flops_are_two_a_multiply_add() -> None:
    a, b, bias = operands([3, 0, 5, 1], 0, torch.float32)
    counter = FlopCounterMode(display=False)
    with counter:
        out = grouped_mm(a, b, offsets_of([3, 0, 5, 1]), bias)
    assert counter.get_total_flops() == 2 * 9 * 4 * 6
    with counter:
        out.sum().backward()
    # Two more products of the same size, and the sums that are the bias gradient.
    assert counter.get_total_flops() == 2 * 2 * 9 * 4 * 6 + 2 * 9 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_meta_has_shapes_only(dtype: torch.dtype) -> None:
    a, b, bias = (t.detach().to("meta").requires_grad_() for t in operands([3, 0, 5, 1], 2, dtype))
    out = grouped_mm(a, b, offsets_of([3, 0, 5, 1]).to("meta"), bias)
    assert out.shape == (11, 6) and out.dtype == dtype
    assert [g.shape for g in torch.autograd.grad(out.sum(), (a, b, bias))] == [a.shape, b.shape, bias.shape]


def test_mistakes_are_named() -> None:
    a, b, bias = operands([3, 0, 5, 1], 0, torch.float32)
    offsets = offsets_of([3, 0, 5, 1])
    with pytest.raises(TypeError, match="one dtype"):
        grouped_mm(a, b.double(), offsets, None)
    with pytest.raises(ValueError, match=r"can't multiply shapes \(9, 4\) and \(4, 6, 4\)"):
        grouped_mm(a, b.transpose(1, 2), offsets, None)
    with pytest.raises(ValueError, match="bias"):
        grouped_mm(a.t(), a, offsets, bias)


def test_torchs_kernel_gives_the_same() -> None:
    sizes = [3, 0, 5, 1]
    offsets = offsets_of(sizes)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(11, 16, generator=generator)
    b = torch.randn(4, 16, 32, generator=generator)
    bias = torch.randn(4, 32, generator=generator)
    torch.testing.assert_close(grouped._native_rows(a, b, offsets, bias), grouped_mm(a, b, offsets, bias))
    torch.testing.assert_close(grouped._native_blocks(a.t(), a, offsets), grouped_mm(a.t(), a, offsets, None))


def test_the_fallback_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    grouped._say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        grouped._say_fallback("cuda", torch.float32)
        grouped._say_fallback("cuda", torch.float32)
    assert [r.message for r in caplog.records] == [
        "torch's grouped matmul does not serve torch.float32 on cuda: one matmul an expert instead"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 64), (4, 64, 128), (4, 128)]
    cpu = [torch.randn(*s, generator=generator).requires_grad_() for s in shapes]
    gpu = [t.detach().to("cuda", dtype).requires_grad_() for t in cpu]
    offsets = offsets_of([30, 0, 31, 5])
    wanted, got = grouped_mm(*cpu[:2], offsets, cpu[2]), grouped_mm(*gpu[:2], offsets.cuda(), gpu[2])
    grad = torch.randn(wanted.shape, generator=generator)
    wanted_all = (wanted, *torch.autograd.grad(wanted, cpu, grad))
    got_all = (got, *torch.autograd.grad(got, gpu, grad.to("cuda", dtype)))
    tolerance = {"rtol": 2e-2, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for g, w in zip(got_all, wanted_all, strict=True):
        torch.testing.assert_close(g.float().cpu(), w, **tolerance)
