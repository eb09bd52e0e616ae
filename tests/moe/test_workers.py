import threading
import time
from collections.abc import Iterator
from itertools import permutations

import pytest
import torch

from tests.moe.test_operator import arguments, call_of
from vlmoe_core.moe import by_expert
from vlmoe_core.moe.workers import IMBALANCE, for_each_expert, share_out

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [*permutations([5, 3, 2, 0]), (1, 1, 1, 1)])
def test_every_expert_has_one_thread(rows: tuple[int, ...]) -> None:
    shares = share_out(rows, 2)
    assert shares is not None and len(shares) == 2
    assert sorted(expert for share in shares for expert in share) == [0, 1, 2, 3]
    loads = [sum(rows[expert] for expert in share) for share in shares]
    assert max(loads) <= IMBALANCE * sum(rows) / 2


@pytest.mark.parametrize("rows", [(10, 1, 1), (7,), (5, 5, 5)])
def test_what_can_not_be_dealt_evenly_is_left_to_torch(rows: tuple[int, ...]) -> None:
    assert share_out(rows, 2) is None


@pytest.mark.usefixtures("two_threads")
def test_each_thread_computes_with_one_and_later_threads_are_as_before() -> None:
    seen: dict[int, tuple[str, int]] = {}
    for_each_expert(lambda e: seen.update({e: (threading.current_thread().name, torch.get_num_threads())}), [2, 2], CPU)
    assert {name.rsplit("_", 1)[0] for name, _ in seen.values()} == {"vlmoe-expert"}
    assert [threads for _, threads in seen.values()] == [1, 1]
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_an_expert_is_raised() -> None:
    def work(expert: int) -> None:
        if expert == 1:
            raise ValueError("expert 1")

    with pytest.raises(ValueError, match="expert 1"):
        for_each_expert(work, [3, 3], CPU)


def test_one_thread_does_it_all_itself() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seen: list[str] = []
    for_each_expert(lambda e: seen.append(threading.current_thread().name), [3, 3], CPU)
    torch.set_num_threads(before)
    assert seen == [threading.current_thread().name] * 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("inference", [False, True])
def test_the_result_is_that_of_one_thread(inference: bool) -> None:
    values = arguments(tokens=64, dropped=5)
    call, biases = call_of(values), (values["up_EH"], values["down_ED"])
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        with torch.inference_mode(inference):
            forward = by_expert.forward(call, *biases, True)
            backward = by_expert.backward(call, torch.ones_like(call.x_TD), *forward[1:])
        found.append([*forward, *backward])
    for several, one in zip(*found, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("two_threads")
def test_several_threads_give_the_same_bits_each_time() -> None:
    values = arguments(tokens=64, dropped=5)
    call, biases = call_of(values), (values["up_EH"], values["down_ED"])
    runs = []
    for _ in range(3):
        forward = by_expert.forward(call, *biases, True)
        runs.append([*forward, *by_expert.backward(call, torch.ones_like(call.x_TD), *forward[1:])])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_an_error_waits_for_the_other_threads() -> None:
    finished = threading.Event()

    def work(expert: int) -> None:
        if expert == 0:
            raise ValueError("expert 0")
        time.sleep(0.1)
        finished.set()

    with pytest.raises(ValueError, match="expert 0"):
        for_each_expert(work, [3, 3], CPU)
    assert finished.is_set()
