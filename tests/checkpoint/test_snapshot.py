"""Copies that stay as they were, in memory that is used again."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.train.support import on_ranks
from vlmoe_core.checkpoint.offers import offer
from vlmoe_core.checkpoint.snapshot import Snapshot

EXPERTS, EMBED, HEAD = "a.experts.up", "embed", "head"


def state() -> dict[str, torch.Tensor]:
    embed = torch.randn(4, 3)
    return {EMBED: embed, HEAD: embed, EXPERTS: torch.randn(3, 5), "turned": torch.randn(2, 6).t()}


WRITTEN = [EMBED, "turned", *(f"a.experts.{n}.up" for n in range(3))]


def test_what_is_owned_is_copied_and_nothing_else() -> None:
    tensors = state()
    owned = [EMBED, "a.experts.1.up", "turned"]
    before = {EMBED: tensors[EMBED].clone(), owned[1]: tensors[EXPERTS][1].clone(), "turned": tensors["turned"].clone()}
    copies = Snapshot().take(tensors, offer(tensors), owned, WRITTEN)
    for tensor in tensors.values():
        tensor.zero_()
    assert copies.keys() == before.keys()
    assert all(torch.equal(copies[key], value) for key, value in before.items())
    assert all(copy.is_contiguous() and copy.untyped_storage().nbytes() == copy.nbytes for copy in copies.values())


def test_the_next_one_is_taken_into_the_same_memory() -> None:
    snapshot, first, second = Snapshot(), state(), state()
    places = {key: copy.data_ptr() for key, copy in snapshot.take(first, offer(first), WRITTEN, WRITTEN).items()}
    copies = snapshot.take(second, offer(second), WRITTEN, WRITTEN)
    assert {key: copy.data_ptr() for key, copy in copies.items()} == places
    assert torch.equal(copies["a.experts.2.up"], second[EXPERTS][2])


def test_another_shape_type_or_owner_takes_no_old_memory() -> None:
    snapshot, tensors = Snapshot(), {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)}
    snapshot.take(tensors, offer(tensors), "abc", "abc")
    tensors = {"a": torch.ones(4), "b": torch.ones(3, dtype=torch.float64), "c": torch.ones(3)}
    copies = snapshot.take(tensors, offer(tensors), "ab", "abc")
    assert [copies[key].dtype for key in "ab"] == [torch.float32, torch.float64] and copies["a"].shape == (4,)
    assert snapshot._copies.keys() == {"a", "b"}, "what it no longer owns is let go"


def test_processes_gather_the_same_tensor_whatever_order_they_have() -> None:
    """Of one shape, so that nothing else would tell."""
    assert on_ranks(2, gathered_in_another_order) == [{"a": [0.0] * 4}, {"b": [1.0] * 4}]


def gathered_in_another_order() -> dict[str, list[float]]:
    """For a child: what it owns of two sharded tensors, which the second process has in turned order."""
    dist.init_process_group("gloo")
    rank, mesh = int(os.environ["RANK"]), init_device_mesh("cpu", (2,))
    values = {"a": torch.zeros(4), "b": torch.ones(4)}
    tensors = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in values.items()}
    tensors = dict(reversed(tensors.items())) if rank else tensors
    copies = Snapshot().take(tensors, offer(tensors), "ab"[rank], "ab")
    dist.barrier()
    dist.destroy_process_group()
    return {key: copy.tolist() for key, copy in copies.items()}
