"""Several processes, imitated here, against real ones."""

from collections import Counter
from typing import Literal

import pytest
import torch

from tests.analysis.estimate.ranks import Seen, third_step
from tests.analysis.estimate.support import EXPERTS, memory_recipe, recipe_of
from tests.train.support import on_ranks
from vlmoe_core.analysis.estimate import wire
from vlmoe_core.analysis.estimate.collectives import Collective
from vlmoe_core.analysis.estimate.follow import MICRO, SHARES, follow
from vlmoe_core.analysis.estimate.rehearsal import Rehearsal, rehearse
from vlmoe_core.analysis.estimate.sends import Traffic
from vlmoe_core.analysis.estimate.shares import holdings
from vlmoe_core.analysis.estimate.world import check_world
from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.train.build import build_objective

Shard = Literal["none", "full"]
TURNS = {"router": {"name": "uniform"}, "balance": {"vloss": 0}}
"""Experts take turns, as the imitation assumes."""


def shared_recipe(
    expert: int, shard: Shard, num_micro: int = 2, precision: str = "fp32", checkpointing: bool = False
) -> Recipe:
    moe = {pool: {**config, **TURNS} for pool, config in EXPERTS.items()}
    recipe = memory_recipe(precision, checkpointing, num_micro, moe=moe)
    return Recipe.model_validate(recipe.model_dump() | {"parallel": {"expert": expert, "shard": shard}})


def parameters_of(recipe: Recipe) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_objective(recipe, None).parameters())


@pytest.mark.parametrize(("world", "expert"), [(7, 1), (8, 2), (16, 8)])
def test_shares_of_all_ranks_make_up_the_model(world: int, expert: int) -> None:
    for shard in ("none", "full"):
        recipe = shared_recipe(expert, shard, num_micro=world)
        found = list(holdings(recipe, NO_LABELS, world, frozenset(), range(world)))
        experts, dense = sum(one.experts for one in found), sum(one.dense for one in found)
        times = 1 if shard == "full" else world // expert
        assert experts % times == 0
        whole = parameters_of(recipe)
        if shard == "full":
            assert experts + dense == whole
        else:
            assert experts // times + dense // world == whole and len({one.parameters for one in found}) == 1
        assert [one.rank for one in found] == list(range(world))
        assert found[0].parameters == max(one.parameters for one in found)
        assert found[-1].parameters == min(one.parameters for one in found)


def of_kind(collectives: tuple[Collective, ...], micros: int = 1) -> Counter[tuple[str, int, torch.dtype]]:
    """Bytes on the wire by operation, group and numbers; those of a micro-batch so many times."""
    found: Counter[tuple[str, int, torch.dtype]] = Counter()
    for one in collectives:
        found[one.operation, one.ranks, one.dtype] += one.wire * (micros if one.part == MICRO else 1)
    return found


CASES = [
    (2, 2, "none", "bf16", True, 1),
    (2, 1, "none", "fp32", False, 1),
    (2, 2, "full", "fp32", False, 1),
    (2, 1, "full", "bf16", False, 2),
    (4, 2, "full", "bf16", True, 1),
]


@pytest.mark.parametrize(("world", "expert", "shard", "precision", "checkpointing", "micros"), CASES)
def test_a_real_step_of_several_processes(
    world: int, expert: int, shard: Shard, precision: str, checkpointing: bool, micros: int
) -> None:
    recipe = shared_recipe(expert, shard, micros * world, precision, checkpointing)
    real: list[Seen] = on_ranks(world, third_step, recipe)
    found = rehearse(recipe, NO_LABELS, world, "cpu")
    for holding, seen in zip(found.holdings, real, strict=True):
        assert (holding.parameters, holding.weights, holding.moments) == (seen.parameters, seen.weights, seen.moments)
    first = real[0]
    averaged = Collective("all-reduce", world, torch.float32, wire.all_reduce(found.even.buckets, world), "")
    expected = of_kind((*found.even.collectives, *([averaged] if found.even.buckets else [])), micros)
    assert +of_kind(first.collectives) == +expected
    assert found.wire == sum(one.wire for one in first.collectives)
    assert found.peak == pytest.approx(first.peak, rel=0.035)
    assert found.worst_peak >= found.peak and found.worst_wire >= found.wire


def test_formulas_of_the_wire_are_what_a_step_sends() -> None:
    for checkpointing in (False, True):
        recipe = shared_recipe(4, "none", 8, "bf16", checkpointing)
        found = follow(recipe, NO_LABELS, "cpu", 8)
        sent = of_kind(found.collectives)
        row = 2 * recipe.model.dim
        assert sent["all-to-all", 4, torch.bfloat16] == wire.token_bytes(found.groups, row, 4, checkpointing)
        assert sent["all-to-all", 4, torch.int32] == wire.count_bytes(found.groups, 4, checkpointing)
        shares = sum(one.wire for one in found.collectives if one.part == SHARES)
        assert shares == wire.all_reduce(found.gradients - found.buckets, 2)


def test_rings_and_all_to_alls() -> None:
    assert wire.all_reduce(1000, 4) == 1500 and wire.all_gather(1000, 4) == wire.reduce_scatter(1000, 4) == 750
    assert wire.all_to_all([1, 2, 3], [1, 10, 100], 0) == 110 and wire.all_to_all([5, 20], [5, 0], 0) == 20
    assert wire.all_reduce(1000, 1) == wire.all_gather(1000, 1) == wire.all_to_all([7], [7], 0) == 0


def kind_of(found: Rehearsal, name: str) -> Traffic:
    (one,) = [kind for kind in found.traffic if kind.kind == name]
    return one


def test_experts_that_all_tokens_choose() -> None:
    without = {pool: {**config, "capacity_factor": None} for pool, config in EXPERTS.items()}
    found: dict[str, Rehearsal] = {}
    for name, moe in {"full": EXPERTS, "dropless": without}.items():
        recipe = memory_recipe("fp32", False, 4, moe=moe)
        recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"expert": 4})})
        found[name] = rehearse(recipe, NO_LABELS, 4)
        assert found[name].replicas == 1
    full, dropless = (kind_of(found[name], "tokens") for name in ("full", "dropless"))
    assert full.even == dropless.even
    assert full.one_sided == pytest.approx(1.25 * full.even, rel=0.02)  # capacity_factor
    assert dropless.one_sided == pytest.approx(4 * dropless.even, rel=0.02)  # each process sends all
    assert found["full"].peak == found["dropless"].peak
    assert found["full"].peak < found["full"].worst_peak < found["dropless"].worst_peak


def test_contrast_gathers_the_features_of_all_ranks() -> None:
    objective = {"name": "masked", "weights": {"itc": 1}}
    recipe = recipe_of({"preset": "tiny", "layers": 2, "vl_layers": 0}, micro=3, num_micro=4, objective=objective)
    found = rehearse(recipe, NO_LABELS, 4)
    features = kind_of(found, "features")
    # Two features of each pair, the number of its picture, and how many pairs there are.
    assert features.even == 3 * (2 * 3 * 4 * recipe.model.dim + 3 * 8 + 8) and features.calls == 4
    assert found.wire == found.worst_wire


def test_several_micro_batches_of_a_process() -> None:
    once, twice = (rehearse(shared_recipe(2, "full", num_micro), NO_LABELS, 4) for num_micro in (4, 8))
    assert (once.micros, twice.micros) == (1, 2)
    for one, two in zip(once.traffic, twice.traffic, strict=True):
        assert two.even == (1 if one.kind == "small" else 2) * one.even
    assert twice.peak > once.peak  # gradients wait


def test_a_task_on_several_processes() -> None:
    recipe = recipe_of(
        {"preset": "tiny", "layers": 2, "moe": {"vision": {"num_experts": 4, "layers": [0]}}},
        num_micro=2,
        streams=("pair",),
        task={"name": "retrieval"},
        init="scratch",
        parallel={"expert": 2},
    )
    found = rehearse(recipe, NO_LABELS, 2)
    assert {kind.kind for kind in found.traffic} == {"tokens", "counts", "gradients", "features", "small"}


def test_processes_that_do_not_fit_are_not_imitated() -> None:
    check_world(shared_recipe(4, "none", 8), 4)
    with pytest.raises(RecipeError, match=r"^8 micro-batches a step .* to 3 processes"):
        check_world(shared_recipe(4, "none", 8), 3)
    assert not torch.distributed.is_initialized()
