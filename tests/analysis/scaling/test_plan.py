"""A predicted step by hand, and which layout is chosen."""

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest

from tests.analysis.scaling.support import sparse_recipe
from vlmoe_core.analysis.scaling.cost import Fabric, Link
from vlmoe_core.analysis.scaling.machine import H100, Machine, machine_of
from vlmoe_core.analysis.scaling.plan import BUCKET, PASSED, UPDATE, Layout, Step, best, layouts, predict
from vlmoe_core.analysis.scaling.work import Pass, Work, work_of

WORK = Work(
    flops=1000,
    useful=1000,
    expert_flops=400,
    passes=(Pass("vision", 2, 16),),
    runs=1,
    dense=100,
    block=20,
    layer=80,
    sparse=2,
    layers=4,
    experts=4,
    dim=8,
    hidden=16,
    element=2,
    activations=50.0,
    capacity=1.5,
    checkpointed=False,
)
LINK = Link(message=0, hop=0, bandwidth=2)
MACHINE = Machine(rate=10, memory=1e4, memory_rate=16, fabric=Fabric(0, 4, LINK, LINK), behind=0)


def test_a_step_alone_is_computation_and_memory() -> None:
    step = predict(WORK, 3, Layout(1, 1, "none"), MACHINE)
    assert step.compute == 300
    assert step.weights == (UPDATE * (100 + 160) + 3 * PASSED * 160) / 16
    assert step.exchange == step.sync == step.gather == 0
    assert step.memory == 16 * 260 + 2 * 260 + 50
    assert step.seconds == step.compute + step.weights
    assert step.efficiency == step.compute / step.seconds


def test_a_step_of_shared_experts() -> None:
    step = predict(WORK, 1, Layout(4, 4, "none"), MACHINE)
    # Half as much again goes to the busiest: 1.5 x 400 operations of experts.
    assert step.compute == 120
    # A layer: 4 numbers of 4 bytes; there, back, and both gradients of 1.5 x 16 rows of 8 x 2 bytes; 3/4 of it leaves.
    assert step.exchange == pytest.approx(2 * 3 / 4 * (16 + 4 * 1.5 * 16 * 16) / 2)
    # The dense gradient in one bucket; the experts have no replica.
    assert step.sync == pytest.approx(2 * 3 / 4 * 400 / 2)
    assert step.memory == 16 * 140 + 4 * 100 + 2 * 140 + 50
    assert predict(WORK, 1, Layout(4, 4, "none"), MACHINE, imbalance=1.0).compute == 100


def test_replicas_of_shares_sum_their_gradients() -> None:
    alone, pair = (predict(WORK, 1, Layout(world, 2, "none"), MACHINE) for world in (2, 4))
    assert alone.sync == pytest.approx(2 * 1 / 2 * 400 / 2)
    assert pair.sync == pytest.approx(2 * 3 / 4 * 400 / 2 + 2 * 1 / 2 * 4 * 80 / 2)


def test_cut_weights_are_gathered_for_each_pass_and_summed_once() -> None:
    step = predict(WORK, 1, Layout(2, 1, "full"), MACHINE)
    # 4 blocks of 20 and 2 layers of 80 (2 bytes), forward and backward; gradients and what lies around in float32.
    gathered = 2 * (4 * 4 * 20 + 2 * 2 * 80)
    summed = 4 * 4 * 20 + 2 * 4 * 80
    assert step.gather == pytest.approx((gathered + summed + 2 * 4 * 20) / 2 / 2)
    assert step.sync == 0


def test_what_does_not_divide_is_padded() -> None:
    even, odd = (predict(WORK, 1, Layout(world, 1, "full"), MACHINE).gather * world / (world - 1) for world in (4, 3))
    assert odd > even


def test_sums_hide_behind_the_computation_but_for_the_last_bucket() -> None:
    dense = 10 * BUCKET // 4
    work = replace(WORK, dense=dense, layer=0, passes=())
    bare = predict(work, 1, Layout(2, 1, "none"), MACHINE).sync
    hidden = predict(work, 1, Layout(2, 1, "none"), replace(MACHINE, behind=1.0, rate=1e-9)).sync
    assert bare == pytest.approx(10 * hidden)
    # Two thirds of the computation are the backward pass.
    rate = work.flops / (bare / 2)
    partly = predict(work, 1, Layout(2, 1, "none"), replace(MACHINE, behind=1.0, rate=rate)).sync
    assert partly == pytest.approx(bare - 2 / 3 * bare / 2)


def test_memory_of_cut_weights() -> None:
    # A quarter of 260 weights; two layers and what lies around the blocks whole; gradients of a whole share.
    gathered = 2 * (4 * 20 + 2 * 80 / 2) + 4 * 20
    expected = 16 * 260 / 4 + gathered + 4 * 100 + 2 * 160 / 2 + 50
    assert predict(WORK, 1, Layout(4, 2, "full"), MACHINE).memory == expected


def test_recomputation_sends_the_tokens_of_the_forward_pass_again() -> None:
    plain, again = (
        predict(replace(WORK, checkpointed=on), 1, Layout(4, 4, "none"), MACHINE).exchange for on in (False, True)
    )
    assert again == pytest.approx(plain + 2 * 3 / 4 * (16 + 2 * 1.5 * 16 * 16) / 2)


def test_layouts_divide_experts_and_devices() -> None:
    found = {(one.expert, one.shard) for one in layouts(WORK, 6)}
    assert found == {(1, "none"), (1, "full"), (2, "none"), (2, "full")}
    assert [(one.expert, one.shard) for one in layouts(WORK, 1)] == [(1, "none")]


def step_of(seconds: float, memory: float) -> Step:
    return Step(Layout(1, 1, "none"), seconds, 0, 0, 0, 0, memory, limit=10, useful=1, far=False)


def test_the_fastest_that_fits_is_chosen() -> None:
    steps = [step_of(1, 11), step_of(3, 9), step_of(2, 10)]
    assert best(steps) is steps[2]
    assert best(steps).bound == "compute"
    too_large = [step_of(1, 12), step_of(2, 11)]
    assert best(too_large) is too_large[1]
    assert best(too_large).bound == "memory"


def test_bounds_are_named_by_where_the_time_goes() -> None:
    slow = replace(MACHINE, rate=inf, memory_rate=inf, memory=inf)
    assert predict(WORK, 1, Layout(4, 4, "none"), slow).bound == "exchange inside a node"
    nodes = replace(slow, fabric=replace(slow.fabric, node=2))
    assert predict(WORK, 1, Layout(4, 4, "none"), nodes).bound == "exchange between nodes"
    assert predict(WORK, 1, Layout(4, 1, "none"), slow).bound == "gradient sync"
    assert predict(WORK, 1, Layout(4, 1, "full"), slow).bound == "gathering weights"
    assert predict(WORK, 1, Layout(1, 1, "none"), replace(slow, memory_rate=1)).bound == "memory bandwidth"


def test_more_micro_batches_take_longer_and_more_experts_each_less_memory() -> None:
    machine, work = machine_of(H100), work_of(sparse_recipe())
    times = [predict(work, micros, Layout(8, 2, "none"), machine).seconds for micros in (1, 2, 4)]
    assert all(a < b for a, b in pairwise(times))
    memory = [predict(work, 1, Layout(8, expert, "none"), machine).memory for expert in (1, 2, 4, 8)]
    assert all(a > b for a, b in pairwise(memory))
    cut = [predict(work, 1, Layout(world, 2, "full"), machine).memory for world in (2, 4, 8, 64)]
    assert all(a > b for a, b in pairwise(cut))


def test_every_constant_says_where_it_comes_from() -> None:
    assert all(one.source for one in H100)
    assert len({one.name for one in H100}) == len(H100)
    machine = machine_of(H100)
    assert machine.rate == pytest.approx(0.4 * 989e12)
    assert machine.fabric.node == 8
    assert machine.fabric.between.bandwidth == 400e9 / 8
