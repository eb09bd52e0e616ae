"""A process that holds a share of the experts, or rows of sharded tensors, reads these and nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from tests.train.support import on_ranks
from vlmoe_core.checkpoint.held import Box
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.reshard import Cut, reshard
from vlmoe_core.checkpoint.restore import load_model_state, load_named_optimizer_state, named_optimizer_state
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.checkpoint.write import write_checkpoint
from vlmoe_core.errors import CheckpointError
from vlmoe_core.moe.exchange import Exchange
from vlmoe_core.moe.experts import Experts, expert_shares
from vlmoe_core.moe.share import Share

Arrays = dict[str, NDArray[np.generic]]
E, D, H, ROWS = 4, 4, 6, 5
"""Experts, widths, and rows that no number of processes divides."""


class Layer(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.experts = Experts(num_experts, D, H, init_std=0.5, implementation="loop", sub_norm_eps=1e-5)


class Model(nn.Module):
    """A sparse layer, a matrix with few rows, a scalar, a tie and a buffer."""

    def __init__(self, num_experts: int = E) -> None:
        super().__init__()
        self.layer = Layer(num_experts)
        self.words = nn.Embedding(ROWS, D)
        self.head = nn.Linear(D, ROWS)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.rand(1))
        self.register_buffer("seen", torch.rand(3))


def trained(num_experts: int = E) -> tuple[Model, torch.optim.AdamW]:
    """A model after a step of random gradients."""
    torch.manual_seed(0)
    model = Model(num_experts)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, optimizer = trained()
    state, moments = model.state_dict(), named_optimizer_state(optimizer, model.named_parameters())
    run = tmp_path_factory.mktemp("run")
    return write_checkpoint(run, state, moments, RunState(1, {}), "seed: 0\n", lambda folder: None, max_shard_bytes=300)


def whole() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = trained()
    return model.state_dict(), named_optimizer_state(optimizer, model.named_parameters())


def share_out(model: Model, share: Share) -> Model:
    model.layer.experts.keep(share, Exchange(None))  # type: ignore[arg-type]
    return model


def loaded(model: Model, checkpoint: Path) -> dict[str, Tensor]:
    """What is in a model and its optimiser after loading."""
    optimizer = torch.optim.AdamW(model.parameters())
    found = read_checkpoint(checkpoint)
    assert found.optimizer is not None
    load_model_state(model, found.model)
    load_named_optimizer_state(optimizer, model.named_parameters(), found.optimizer, expert_shares(model))
    return model.state_dict() | named_optimizer_state(optimizer, model.named_parameters())


def expected(share: Share) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with the experts of a share."""
    state, moments = whole()
    return {
        name: tensor[share.first : share.first + share.count] if ".experts." in name and tensor.ndim else tensor
        for name, tensor in (state | moments).items()
    }


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_a_share_reads_its_experts_by_number(checkpoint: Path, degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch)
    for rank in range(degree):
        share = Share(rank * E // degree, E // degree, E)
        asked.clear()
        found, wanted = loaded(share_out(Model(), share), checkpoint), expected(share)
        assert found.keys() == wanted.keys()
        assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
        numbers = {int(number) for key, _ in asked if (number := key.partition(".experts.")[2].split(".")[0]).isdigit()}
        assert numbers == set(share.numbers)
        untied = [key for key, _ in asked if key != "head.weight"]
        assert len(untied) == len(set(untied)), "each tensor is read once"


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Box | None]]:
    """A list that grows by each key that is read, and the part of it."""
    asked: list[tuple[str, Box | None]] = []
    read = StoredTensors._read

    def reading(self: StoredTensors, part: str, box: Box | None) -> Tensor:
        asked.append((part, box))
        return read(self, part, box)

    monkeypatch.setattr(StoredTensors, "_read", reading)
    return asked


def test_another_number_of_experts_is_refused_with_both(checkpoint: Path) -> None:
    model = share_out(Model(8), Share(4, 2, 8))
    with pytest.raises(CheckpointError, match=r"experts\.up\.weight is \(4, 6, 4\), the model wants \(8, 6, 4\)"):
        load_model_state(model, read_checkpoint(checkpoint).model)
    optimizer, moments = torch.optim.AdamW(model.parameters()), read_checkpoint(checkpoint).optimizer
    assert moments is not None
    with pytest.raises(CheckpointError, match=r"experts.*' is \(4, .*, but its parameter is \(8, "):
        load_named_optimizer_state(optimizer, model.named_parameters(), moments, expert_shares(model))


def test_moments_have_one_order_whichever_files_they_lie_in(checkpoint: Path, tmp_path: Path) -> None:
    """Processes that hold different experts read different files, and go through the moments together after that."""
    reshard(checkpoint, tmp_path / "three", Cut(3, 1))
    index = json.loads((tmp_path / "three" / "optim.safetensors.index.json").read_text())["weight_map"]
    first = {n: index[f"exp_avg.layer.experts.{n}.up.weight"] for n in range(E)}
    second = {n: index[f"exp_avg_sq.layer.experts.{n}.up.weight"] for n in range(E)}
    assert {first[n] < second[n] for n in range(E) if first[n] != second[n]} == {True, False}
    orders = []
    for number in range(E):
        found = loaded(share_out(Model(), Share(number, 1, E)), tmp_path / "three")
        orders.append([name for name in found if name.endswith("experts.up.weight")])
    assert all(order == orders[0] for order in orders) and len(orders[0]) == 4


def on_a_mesh(checkpoint: Path, degree: int, dimension: int) -> tuple[Share, Arrays, Arrays, int]:
    """For a child: its share; all tensors, put together and its own parts; and bytes that it read."""
    dist.init_process_group("gloo")
    grid = init_device_mesh("cpu", (dist.get_world_size() // degree, degree), mesh_dim_names=("data", "expert"))
    world = init_device_mesh("cpu", (dist.get_world_size(),))
    model, count = Model(), E // degree
    share = Share(grid.get_local_rank("expert") * count, count, E)
    share_out(model, share)
    fully_shard(model.layer.experts, mesh=grid["data"], shard_placement_fn=lambda parameter: Shard(dimension))
    fully_shard(model, mesh=world)
    read: list[int] = []
    load = StoredTensors._read

    def reading(self: StoredTensors, part: str, box: Box | None) -> Tensor:
        tensor = load(self, part, box)
        read.append(tensor.nbytes)
        return tensor

    StoredTensors._read = reading  # type: ignore[method-assign]
    found = loaded(model, checkpoint)
    together = {name: put_together(tensor).numpy() for name, tensor in found.items()}
    parts = {name: local(tensor).numpy() for name, tensor in found.items()}
    for name, tensor in found.items():
        assert isinstance(tensor, DTensor) == (not name.startswith("step.") and name != "seen"), name
    dist.barrier()
    dist.destroy_process_group()
    return share, together, parts, sum(read)


def put_together(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


MESHES = [(2, 1, 0), (2, 2, 0), (4, 1, 0), (4, 2, 0), (4, 2, 1), (4, 4, 0)]
"""Processes, expert degree, and the dimension along which the experts of a share are cut."""


@pytest.mark.parametrize(("ranks", "degree", "dimension"), MESHES)
def test_sharded_tensors_and_moments(checkpoint: Path, ranks: int, degree: int, dimension: int) -> None:
    found: list[Any] = on_ranks(ranks, on_a_mesh, checkpoint, degree, dimension)
    assert not [answer for answer in found if isinstance(answer, Exception)], found
    assert {share.first for share, *_ in found} == set(range(0, E, E // degree))
    for share, together, parts, read in found:
        wanted = expected(share)
        assert together.keys() == wanted.keys()
        assert [name for name, tensor in wanted.items() if not np.array_equal(together[name], tensor.numpy())] == []
        assert read == sum(part.nbytes for part in parts.values()), "only what it holds, the tied tensor twice"


def test_a_process_without_a_row_of_an_expert(checkpoint: Path) -> None:
    """The one expert of a share is cut over two replicas: the second holds none of it, and has moments all the same."""
    found = on_ranks(2, alone_and_empty, checkpoint)
    assert found == [((1, H, D), "torch.float32"), ((0, H, D), "torch.float32")]


def alone_and_empty(checkpoint: Path) -> tuple[tuple[int, ...], str]:
    """For a child: shape and type of a moment where the one expert of a share is cut over two processes."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = share_out(Model(), Share(3, 1, E))
    fully_shard(model.layer.experts, mesh=mesh)
    moment = local(loaded(model, checkpoint)["exp_avg.layer.experts.up.weight"])
    dist.barrier()
    dist.destroy_process_group()
    return tuple(moment.shape), str(moment.dtype)
