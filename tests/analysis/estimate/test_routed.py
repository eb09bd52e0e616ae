"""Assumed routings, by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmoe_core.analysis.estimate.routed import even, one_sided


def choices(tokens: int, top_k: int, num_experts: int, capacity: int | None = None) -> Any:
    """As much of a plan as an assumption looks at."""
    expert_TK = torch.zeros(tokens, top_k, dtype=torch.int64)
    return SimpleNamespace(expert_TK=expert_TK, num_experts=num_experts, capacity=capacity)


def test_what_does_not_divide_goes_to_the_first_processes() -> None:
    found = even(choices(3, 2, 4), 4, 0)
    assert (found.sent, found.arriving) == ([2, 2, 1, 1], [2] * 4)
    assert even(choices(3, 2, 4), 4, 3).arriving == [1] * 4


@pytest.mark.parametrize(("capacity", "sent"), [(1, [2, 2]), (2, [4, 4]), (9, [6, 6])])
def test_no_more_than_there_are_places(capacity: int, sent: list[int]) -> None:
    assert even(choices(12, 1, 4, capacity), 2, 0).sent == sent


@pytest.mark.parametrize(
    ("top_k", "experts", "capacity", "sent"),
    [
        (1, 4, None, [6, 0, 0, 0]),
        (2, 4, None, [6, 2, 2, 2]),  # a token has one expert on the first process; its other one is elsewhere
        (2, 8, None, [12, 0, 0, 0]),
        (1, 4, 3, [3, 1, 1, 1]),
        (2, 4, 3, [3, 3, 3, 3]),
    ],
)
def test_the_first_process_gets_all_that_it_can(
    top_k: int, experts: int, capacity: int | None, sent: list[int]
) -> None:
    found = one_sided(choices(6, top_k, experts, capacity), 4, 0)
    assert (found.sent, found.arriving) == (sent, [sent[0]] * 4)
    assert one_sided(choices(6, top_k, experts, capacity), 4, 2).arriving == [sent[2]] * 4
