"""Collectives by hand, and that more of anything costs no less."""

import pytest

from vlmoe_core.analysis.scaling.cost import (
    Cost,
    Fabric,
    Group,
    Link,
    all_gather,
    all_reduce,
    all_to_all,
    group_of,
    left_over,
    reduce_scatter,
)

FABRIC = Fabric(start=1.0, node=4, inside=Link(message=0.1, hop=0.5, bandwidth=8), between=Link(0.2, 3.0, 2))
COLLECTIVES = (all_to_all, all_gather, reduce_scatter, all_reduce)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_process_waits_for_nobody(collective: object) -> None:
    assert collective(1e9, Group(1, 1), FABRIC) == Cost()  # type: ignore[operator]


def test_groups_of_a_row_of_processes() -> None:
    # 16 processes, 4 a node: those that share experts stand side by side, their replicas that far apart.
    assert group_of(16, 1, 4) == Group(16, 4) and Group(16, 4).nodes == 4
    assert group_of(4, 1, 4) == Group(4, 4) and Group(4, 4).nodes == 1
    assert group_of(8, 2, 4) == Group(8, 2) and Group(8, 2).nodes == 4
    assert group_of(2, 8, 4) == Group(2, 1) and Group(2, 1).nodes == 2


def test_all_to_all_inside_a_node() -> None:
    # 3 others, each gets a quarter of 64 bytes: 48 bytes at 8 a second, 3 messages of 0.1.
    cost = all_to_all(64, Group(4, 4), FABRIC)
    assert (cost.latency, cost.inside, cost.between) == pytest.approx((1.3, 6.0, 0.0))
    assert cost.seconds == pytest.approx(7.3)


def test_all_to_all_between_nodes() -> None:
    # 8 processes: 3 others here, 4 there; an eighth of 64 bytes each.
    cost = all_to_all(64, Group(8, 4), FABRIC)
    assert (cost.latency, cost.inside, cost.between) == pytest.approx((1 + 0.3 + 0.8, 3.0, 16.0))
    assert cost.seconds == pytest.approx(18.1)


def test_all_gather_inside_a_node() -> None:
    # Three quarters of 64 bytes come from others, in three steps.
    cost = all_gather(64, Group(4, 4), FABRIC)
    assert (cost.latency, cost.inside, cost.between) == pytest.approx((2.5, 6.0, 0.0))
    assert reduce_scatter(64, Group(4, 4), FABRIC) == cost


def test_all_gather_between_nodes() -> None:
    # Half of 64 bytes comes from the other node, over four cards; a ring of 8 has one hop of 7 between the nodes.
    cost = all_gather(64, Group(8, 4), FABRIC)
    assert (cost.latency, cost.inside, cost.between) == pytest.approx((1 + 6 * 0.5 + 3, 6.0, 4.0))
    # One process a node: each card brings all that is missing.
    assert all_gather(64, Group(4, 1), FABRIC).between == pytest.approx(64 * 3 / 4 / 2)


def test_all_reduce_is_two_rounds_or_a_tree() -> None:
    cost = all_reduce(64, Group(4, 4), FABRIC)
    assert (cost.latency, cost.inside) == pytest.approx((1 + 2 * 3 * 0.5, 12.0))
    # 16 nodes: a ring has 15 hops between them each way, a tree 4 levels.
    many = all_reduce(64, Group(64, 4), FABRIC)
    assert many.latency == pytest.approx(1 + 2 * (3 * 0.5 + 4 * 3))


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("stride", (1, 2, 8))
def test_more_bytes_and_more_processes_cost_no_less(collective: object, stride: int) -> None:
    costs = [
        [collective(sent, group_of(size, stride, 4), FABRIC).seconds for sent in (1, 1e3, 1e6)]  # type: ignore[operator]
        for size in (1, 2, 4, 8, 16, 64, 256)
    ]
    assert all(row == sorted(row) for row in costs)
    assert all(list(column) == sorted(column) for column in zip(*costs, strict=True))


def test_what_runs_behind_the_computation_is_not_waited_for() -> None:
    assert (left_over(3.0, 5.0), left_over(5.0, 3.0)) == (0.0, 2.0)
