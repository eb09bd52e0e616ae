import mmap
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vlmoe_core.moe import pages

LARGE = pages.LARGE // 4


@pytest.mark.parametrize("size", [0, 6, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_writable_tensor_of_the_same_shape(size: int, dtype: torch.dtype) -> None:
    like = torch.zeros(2, size, dtype=dtype)
    fresh = pages.empty_like(like)
    assert fresh.shape == like.shape and fresh.dtype == dtype and fresh.is_contiguous()
    fresh.fill_(3.0)
    assert (fresh == 3.0).all()


def test_memory_that_is_let_go_serves_the_next_one_of_its_size() -> None:
    like = torch.zeros(LARGE + 1)
    first, second = pages.empty_like(like), pages.empty_like(like)
    assert first.data_ptr() != second.data_ptr()
    address, view = first.data_ptr(), first[:5]
    del first
    third = pages.empty_like(like)  # the view still holds the memory of the first
    assert third.data_ptr() not in (address, second.data_ptr())
    del view
    assert pages.empty_like(like).data_ptr() == address
    assert pages.empty_like(torch.zeros(LARGE + 2)).data_ptr() != address


def test_it_becomes_a_gradient_without_a_copy() -> None:
    weight = torch.zeros(LARGE, requires_grad=True)
    given: list[int] = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
            return w.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            fresh = pages.empty_like(weight).fill_(2.0)
            given.append(fresh.data_ptr())
            return fresh

    Square.apply(weight).backward()
    assert weight.grad is not None and weight.grad.data_ptr() == given[0]


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert pages.empty_like(torch.zeros(LARGE + 3)).fill_(1.0).sum() == LARGE + 3


@pytest.mark.parametrize("size", [6, LARGE + 4])
def test_memory_of_another_dtype_that_was_never_written_is_not_a_number(size: int) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):  # fresh memory, and memory that was used before
            fresh = pages.empty_like(torch.zeros(size, dtype=torch.bfloat16), torch.float32)
            assert fresh.dtype == torch.float32 and fresh.isnan().all()
            fresh.fill_(1.0)
            del fresh
    finally:
        torch.use_deterministic_algorithms(False)


def test_fake_tensors_take_no_memory() -> None:
    with FakeTensorMode():
        fresh = pages.empty_like(nn.Parameter(torch.empty(2**24, 8)))
    assert isinstance(fresh, FakeTensor)
