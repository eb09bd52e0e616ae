"""Peak memory is counted by hand for work of known sizes."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from vlmoe_core.moe.peak import _peak, peak_bytes

FLOAT = 4


def none() -> list[Tensor]:
    return []


def test_the_most_that_is_alive_at_one_moment() -> None:
    def work() -> Tensor:
        first, second = torch.empty(1000), torch.empty(2000)
        del first
        third = torch.empty(500)
        del second
        return third.add(1)

    assert peak_bytes(work, none) == 3000 * FLOAT


def test_a_release_before_the_peak_is_not_in_it() -> None:
    def work() -> None:
        for _ in range(3):
            torch.empty(1000)

    assert peak_bytes(work, none) == 1000 * FLOAT


def test_no_allocation_is_nothing() -> None:
    assert peak_bytes(lambda: None, none) == 0


def test_what_was_there_before_is_not_counted_even_when_it_goes() -> None:
    before = [torch.empty(5000)]
    # A first profile makes the allocator remember the sizes of what it allocates from then on.
    peak_bytes(lambda: before.append(torch.empty(7000)), none)

    def work() -> Tensor:
        before.clear()
        return torch.empty(100)

    assert peak_bytes(work, none) == 100 * FLOAT


def test_a_gradient_is_left_out_from_its_allocation_on() -> None:
    weight = torch.empty(1000, requires_grad=True)

    def work() -> None:
        temporary = torch.empty(300)
        weight.grad = torch.empty(1000)
        del temporary
        torch.empty(200)

    assert peak_bytes(work, lambda: [weight.grad]) == 300 * FLOAT


def test_a_gradient_that_is_copied_leaves_the_other_buffer_in_the_sum() -> None:
    weight = torch.empty(1000, requires_grad=True)

    def work() -> None:
        weight.grad = torch.zeros(1000).clone()

    assert peak_bytes(work, lambda: [weight.grad]) == 1000 * FLOAT


def test_memory_that_a_gradient_takes_over_counted_before() -> None:
    # (address, bytes): a temporary of 1000 goes, and the gradient comes to the same place beside another of 50.
    changes = [(1, 1000), (1, -1000), (2, 50), (1, 1000), (2, -50)]
    assert _peak(changes, Counter({1: 1000})) == 1000
    assert _peak(changes[2:], Counter({1: 1000})) == 50


def test_a_release_of_what_was_never_seen_to_come_is_nothing() -> None:
    assert _peak([(7, -500), (1, 100), (7, -500), (2, 30)], Counter()) == 130


def test_a_gradient_that_is_part_of_a_larger_buffer_sets_its_own_bytes_apart() -> None:
    weight = torch.empty(1000, requires_grad=True)

    def work() -> None:
        weight.grad = torch.empty(1500)[:1000]

    assert peak_bytes(work, lambda: [weight.grad]) == 500 * FLOAT


def test_two_gradients_in_one_buffer() -> None:
    weights = [torch.empty(600, requires_grad=True), torch.empty(400, requires_grad=True)]

    def work() -> None:
        both = torch.empty(1000)
        for weight, part in zip(weights, both.split([600, 400]), strict=True):
            weight.grad = part

    assert peak_bytes(work, lambda: [weight.grad for weight in weights]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_and_its_backward_pass(dtype: torch.dtype) -> None:
    x, weight = torch.randn(50, 20, dtype=dtype, requires_grad=True), torch.randn(20, 30, dtype=dtype)
    weight.requires_grad_()
    grad = torch.randn(50, 30, dtype=dtype)

    def work() -> None:
        (x @ weight).backward(grad)

    # The output is a temporary of the line above and alive beside the gradient of x; that of weight is set apart.
    assert peak_bytes(work, lambda: [weight.grad]) == (50 * 30 + 50 * 20) * dtype.itemsize
