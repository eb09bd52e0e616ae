"""Router health over a step, and the alarm of a dead expert."""

import torch
from accelerate import Accelerator

from tests.train.support import on_ranks
from vlmoe_core.decimals import exact
from vlmoe_core.model.block import Routed
from vlmoe_core.moe.plan import RoutingPlan, capacity_of, make_plan
from vlmoe_core.train.health import Alarm, HealthSummary, RouterHealth


def plan(experts: list[int], factor: float | None = None) -> RoutingPlan:
    """A plan that sends each token to a given one of four experts."""
    logits = 5.0 * torch.nn.functional.one_hot(torch.tensor(experts, dtype=torch.int64), 4).float().view(-1, 4)
    capacity = capacity_of(len(experts), 4, 1, None if factor is None else exact(factor))
    return make_plan(logits, logits, top_k=1, weights="gate", priority="gate", capacity=capacity, noise_std=0.0)


def test_an_expert_is_dead_only_if_no_micro_batch_used_it() -> None:
    health = RouterHealth()
    health.add([("pair", Routed(1, "text", plan([0, 0, 1]), 0))])
    health.add([("pair", Routed(1, "text", plan([2, 2, 2]), 0))])
    summary = health.summary()
    figures = summary.figures
    assert summary.idle == {"router/text/1": frozenset({3})}
    assert figures["router/text/1/dead"] == 1
    assert figures["router/text/1/busiest"] == 0.5
    assert figures["router/text/1/dropped"] == 0


def test_drops_and_the_effective_capacity_are_counted_by_group() -> None:
    health = RouterHealth()
    health.add([("pair", Routed(0, "vision", plan([0, 0, 0, 1], factor=1.25), 0))])
    assert health.summary().figures["router/vision/0/dropped"] == 0.25
    assert health.groups == {"router/vision/0, pair stream": "4 tokens to 4 experts, 2 places an expert"}


def test_a_layer_that_no_token_came_to_is_left_out() -> None:
    health = RouterHealth()
    health.add([("pair", Routed(0, "vision", plan([]), 0))])
    assert health.summary() == HealthSummary({}, {}) and health.groups == {}


def test_the_alarm_names_an_expert_once_when_it_stays_without_tokens() -> None:
    alarm = Alarm()
    steps = [{0, 1}, {2}, {3}, {3}, {3}, {3, 0}, {0, 3}, {0}, set()]
    told = [alarm.messages({"router/text/1": frozenset(idle)}) for idle in steps]
    assert [len(messages) for messages in told] == [0, 0, 0, 1, 0, 0, 1, 0, 0]
    assert told[3] == ["router/text/1: no token chose expert 3 at two logged steps in a row"]
    assert "expert 0 " in told[6][0]


def health_of_one_rank(layers: dict[int, list[list[int]]]) -> tuple[dict[str, float], dict[str, frozenset[int]]]:
    """For a child: the summary where each rank met other layers, or none."""
    accelerator = Accelerator(cpu=True)
    health = RouterHealth()
    for layer, of_ranks in layers.items():
        if experts := of_ranks[accelerator.process_index]:
            health.add([("pair", Routed(layer, "text", plan(experts), 0))])
    summary = health.summary()
    return dict(summary.figures), dict(summary.idle)


def test_layers_that_ran_on_one_rank_only_are_told_by_all() -> None:
    """The last micro-batch of a split may leave a rank with nothing; all ranks still reduce the same tallies."""
    layers = {0: [[0, 0], [1, 2]], 1: [[3], []], 2: [[], [0, 1, 2, 3]]}
    alone = RouterHealth()
    for layer, of_ranks in layers.items():
        for experts in of_ranks:
            alone.add([("pair", Routed(layer, "text", plan(experts), 0))])
    expected = alone.summary()
    for figures, idle in on_ranks(2, health_of_one_rank, layers):
        assert figures == expected.figures and idle == expected.idle
    assert expected.idle["router/text/1"] == frozenset({0, 1, 2})


def test_a_rank_that_met_no_layer_reduces_all_of_them() -> None:
    for figures, idle in on_ranks(2, health_of_one_rank, {0: [[0, 0, 1], []], 3: [[2, 2], []]}):
        assert figures["router/text/0/busiest"] == 2 / 3
        assert idle == {"router/text/0": frozenset({2, 3}), "router/text/3": frozenset({0, 1, 3})}
