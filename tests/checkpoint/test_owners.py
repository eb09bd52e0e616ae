"""Of what several processes hold each tensor is written by one, and the work is shared."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe_core.checkpoint.offers import Offer, Offers, offer
from vlmoe_core.checkpoint.owners import Plan, balance, make_plan
from vlmoe_core.errors import CheckpointError
from vlmoe_core.moe.share import Share

UP, STEP, DENSE = "a.experts.up", "step.a.experts.up", "norm"


def held(first: int, count: int, total: int) -> Offers:
    """What a process offers that holds some experts of a layer."""
    tensors = {DENSE: torch.ones(6), UP: torch.ones(count, 4), STEP: torch.tensor(1.0)}
    return offer(tensors, lambda name: Share(first, count, total) if ".experts." in name else None)


def keys(plan: Plan, rank: int) -> list[str]:
    return [key for names in plan.files[rank].values() for key in names]


def index(plan: Plan) -> dict[str, str]:
    found: dict[str, str] = json.loads(plan.index)["weight_map"]
    return found


def test_experts_have_their_numbers_and_what_is_held_twice_is_written_once() -> None:
    plan = make_plan("model", [held(first, 2, 4) for first in (0, 2, 0, 2)], 10**6)
    names = [f"a.experts.{n}.up" for n in range(4)]
    assert sorted(key for rank in range(4) for key in keys(plan, rank)) == sorted([DENSE, STEP, *names])
    assert {key for rank in (0, 2) for key in keys(plan, rank)} >= set(names[:2])
    assert {key for rank in (1, 3) for key in keys(plan, rank)} >= set(names[2:])
    assert plan.written == set(index(plan)) == {DENSE, STEP, *names}
    assert all(plan.owned(rank) == set(keys(plan, rank)) for rank in range(4))
    assert json.loads(plan.index)["metadata"]["total_size"] == 4 * (6 + 1 + 4 * 4)


def test_shards_are_numbered_through_over_the_processes() -> None:
    plan = make_plan("optim", [held(0, 2, 4), held(2, 2, 4)], 16)
    shards = [name for files in plan.files for name in files]
    assert shards == [f"optim-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert index(plan) == {key: shard for files in plan.files for shard, held in files.items() for key in held}


def test_the_order_is_that_of_the_names_whatever_that_of_the_tensors_was() -> None:
    """What is read back from an index has no other order, and must be cut as the run's own processes cut it."""
    told = held(0, 3, 3)
    turned = replace(told, tensors=dict(reversed(told.tensors.items())))
    plans = [make_plan("model", [offers], 10**6) for offers in (told, turned)]
    assert keys(plans[0], 0) == keys(plans[1], 0) == sorted([DENSE, *(f"a.experts.{n}.up" for n in range(3)), STEP])


def test_a_process_without_tensors_writes_nothing() -> None:
    plan = make_plan("model", [offer({"w": torch.ones(3)}), offer({"w": torch.ones(3)})], 10**6)
    assert [len(files) for files in plan.files] == [1, 0]
    assert make_plan("model", [offer({}), offer({})], 10**6).files == [{}, {}]


def test_a_tie_that_one_process_sees_is_one_for_all() -> None:
    """A sharded tensor may have no values on some processes, which then can't see what it is tied to."""
    tensors = {"embed": Offer(None, 8), "head": Offer(None, 8)}
    plan = make_plan("model", [Offers(tensors, {}, None), Offers(tensors, {"head": "embed"}, None)], 10**6)
    assert plan.written == {"embed"}
    assert json.loads(plan.index)["metadata"]["tied"] == {"head": "embed"}


def test_what_nobody_holds_and_what_two_hold_differently_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.experts\.1\.up' is missing"):
        make_plan("model", [held(0, 1, 3), held(2, 1, 3)], 100)
    with pytest.raises(CheckpointError, match="'w' has 16 bytes on process 1, elsewhere 12"):
        make_plan("model", [offer({"w": torch.ones(3)}), offer({"w": torch.ones(4)})], 100)
    with pytest.raises(CheckpointError, match=r"'a\.experts\.up' has 3 experts, but this process holds 2"):
        offer({UP: torch.ones(3, 4)}, lambda name: Share(0, 2, 4))


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=40, max_size=80), st.integers(1, 8))
def test_many_small_tensors_are_shared_evenly(sizes: list[int], ranks: int) -> None:
    named = {str(n): size for n, size in enumerate(sizes)}
    owners = balance(named, {name: list(range(ranks)) for name in named}, ranks)
    loads = loads_of(named, owners, ranks)
    assert owners.keys() == named.keys()
    assert max(loads) - min(loads) <= max(sizes)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(10, 30))
def test_what_few_hold_is_evened_out_by_what_all_hold(data: int, expert: int, each: int, dense: int) -> None:
    """Experts are alike on all shares here; dense tensors go to whoever has least."""
    ranks = data * expert
    sizes = {f"e{n}": 50 for n in range(each * expert)} | {f"d{n}": 50 for n in range(dense)}
    holders: dict[str, Sequence[int]] = {f"d{n}": range(ranks) for n in range(dense)}
    holders |= {f"e{n}": [r for r in range(ranks) if r % expert == n // each] for n in range(each * expert)}
    owners = balance(sizes, holders, ranks)
    assert all(owners[name] in holders[name] for name in sizes)
    loads = loads_of(sizes, owners, ranks)
    assert max(loads) - min(loads) <= 50


def loads_of(sizes: dict[str, int], owners: dict[str, int], ranks: int) -> list[int]:
    return [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(ranks)]
