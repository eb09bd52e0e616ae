"""How processes are arranged: which sizes fit, who holds which experts, who is a replica of whom."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pydantic import ValidationError

from tests.train.support import on_ranks, pretrain_child, tiny
from vlmoe_core.errors import RecipeError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.train.config import ParallelConfig
from vlmoe_core.train.mesh import Mesh, check_mesh, check_processes, open_mesh


def model(vision: int, text: int, **more: Any) -> ModelConfig:
    """A model with two pools of so many experts."""
    pools = {"vision": {"num_experts": vision, "layers": [1]}, "text": {"num_experts": text, "layers": [0]}}
    moe = {name: {**pool, **more} for name, pool in pools.items() if pool["num_experts"]}
    sizes = {"layers": 2, "dim": 16, "heads": 2, "hidden": 32, "vl_layers": 1, "patch_size": 4, "image_size": 16}
    return ModelConfig.model_validate({**sizes, "max_text_length": 24, "moe": moe})


def brute_force(ranks: int, *experts: int) -> list[int]:
    """The sizes that fit: whole replicas, and every process the same number of experts of each layer."""
    return [
        size
        for size in range(1, ranks + 1)
        if size * (ranks // size) == ranks and all(size * (number // size) == number for number in experts)
    ]


@pytest.mark.parametrize(("vision", "text"), [(4, 4), (32, 32), (12, 8), (5, 5), (1, 16)])
def test_what_fits_is_taken_and_what_does_not_is_answered_with_what_fits(vision: int, text: int) -> None:
    for ranks, size in product((1, 2, 3, 4, 6, 8, 12, 32), range(2, 34)):
        config, fits = ParallelConfig(expert=size), brute_force(ranks, vision, text)
        if size in fits:
            check_mesh(config, model(vision, text), ranks)
            continue
        with pytest.raises(RecipeError) as caught:
            check_mesh(config, model(vision, text), ranks)
        message = str(caught.value)
        assert message.startswith(f"parallel.expert is {size},") and f"processes ({ranks})" in message
        offered = re.search(r"these sizes fit: ([\d, ]+);", message)
        assert offered is not None and [int(n) for n in offered[1].split(", ")] == fits
        assert ", ".join(str(n) for n in sorted({vision, text})) in message


def test_one_is_always_taken() -> None:
    for ranks, experts in product((1, 3, 7), (0, 1, 4, 5)):
        check_mesh(ParallelConfig(expert=1, shard="full"), model(experts, experts), ranks)


def test_a_model_without_sparse_layers_shares_no_experts() -> None:
    with pytest.raises(RecipeError, match=r"parallel.expert is 2, but the model has no sparse layer; set it to 1"):
        check_mesh(ParallelConfig(expert=2), model(0, 0), 4)


def test_layers_with_fewer_experts_count_what_they_keep() -> None:
    kept = {1: [0, 2, 3]}
    pools = {"vision": {"num_experts": 4, "layers": [1], "kept_experts": kept}, "text": {"num_experts": 4}}
    config = model(4, 4).model_dump() | {"moe": pools}
    with pytest.raises(RecipeError, match=r"of the experts of each layer \(3, 4\); these sizes fit: 1;"):
        check_mesh(ParallelConfig(expert=2), ModelConfig.model_validate(config), 2)


def test_processes_that_can_train_a_recipe_together(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "batch.size={image: 12, text: 12, pair: 12}", "parallel.expert=2").recipe
    check_processes(recipe, 2)
    for ranks in (4, 5):
        with pytest.raises(RecipeError, match=rf"^6 micro-batches .* to {ranks} processes; .* fit: 1, 2, 3, 6; or"):
            check_processes(recipe, ranks)
    with pytest.raises(RecipeError, match=r"^parallel.expert is 2, which must divide the number of processes \(3\)"):
        check_processes(recipe, 3)


def test_examples_that_are_compared_are_on_different_processes_but_at_the_same_time(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "batch.size={image: 8, text: 8, pair: 8}", "objective.weights.itc=1").recipe
    check_processes(recipe, 4)
    with pytest.raises(RecipeError, match=r"^image-text contrast .* which 4 micro-batches on 2 processes .* is 2$"):
        check_processes(recipe, 2)


@pytest.mark.parametrize("value", [0, -1])
def test_no_process_is_no_size(value: int) -> None:
    with pytest.raises(ValidationError):
        ParallelConfig(expert=value)


@pytest.mark.parametrize(("expert", "data"), [(1, 1), (1, 4), (4, 1), (2, 3), (8, 4)])
def test_each_replica_covers_all_experts_exactly_once(expert: int, data: int) -> None:
    total = 8 * 3
    for replica in range(data):
        meshes = [Mesh(expert, data, "none", expert_rank=rank, data_rank=replica) for rank in range(expert)]
        shares = [mesh.share(total) for mesh in meshes]
        assert [number for share in shares for number in share.numbers] == list(range(total))
        assert {share.count for share in shares} == {total // expert} and {share.total for share in shares} == {total}
        assert {mesh.size for mesh in meshes} == {expert * data}


def places(expert: int) -> dict[str, Any]:
    """For a child: its place in the mesh, and the ranks that it meets in each group."""
    dist.init_process_group("gloo")
    mesh = open_mesh(ParallelConfig(expert=expert, shard="full"), "cpu")
    assert mesh.grid is not None and mesh.world is not None
    names = mesh.grid.mesh_dim_names
    groups = {name: dist.get_process_group_ranks(mesh.grid.get_group(name)) for name in names or ()}
    found = {
        "expert": (mesh.expert, mesh.expert_rank),
        "data": (mesh.data, mesh.data_rank),
        "groups": groups | {"world": dist.get_process_group_ranks(mesh.world.get_group())},
        "experts": (list(mesh.share(4).numbers), list(mesh.share(8).numbers)),
        "shard": mesh.shard,
    }
    dist.destroy_process_group()
    return found


def test_four_processes_two_shares() -> None:
    """By hand: ranks stand row by row, the processes that share experts next to each other."""
    answers = on_ranks(4, places, 2)
    groups = [
        {"data": [0, 2], "expert": [0, 1]},
        {"data": [1, 3], "expert": [0, 1]},
        {"data": [0, 2], "expert": [2, 3]},
        {"data": [1, 3], "expert": [2, 3]},
    ]
    low, high = ([0, 1], [0, 1, 2, 3]), ([2, 3], [4, 5, 6, 7])
    for rank, answer in enumerate(answers):
        assert answer == {
            "expert": (2, rank % 2),
            "data": (2, rank // 2),
            "groups": groups[rank] | {"world": [0, 1, 2, 3]},
            "experts": high if rank % 2 else low,
            "shard": "full",
        }


def test_one_process_needs_no_mesh() -> None:
    mesh = open_mesh(ParallelConfig(shard="full"), "cpu")
    assert (mesh.expert, mesh.data, mesh.grid, mesh.world) == (1, 1, None, None)
    assert mesh.share(4).whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("parallel.expert=3",),
            "parallel.expert is 3, which must divide the number of processes (2) and of the experts of each layer (4); "
            "these sizes fit: 1, 2; or start another number of processes",
        ),
        (
            ("parallel.expert=2", "model.moe={}"),
            "parallel.expert is 2, but the model has no sparse layer; set it to 1",
        ),
    ],
)
def test_a_run_refuses_what_does_not_fit_on_every_rank(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    answers = on_ranks(2, pretrain_child, tiny(tmp_path, *overrides), tmp_path / "run")
    assert [(type(answer), str(answer)) for answer in answers] == [(RecipeError, message)] * 2
    assert not (tmp_path / "run").exists()
