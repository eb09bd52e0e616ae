"""What one process alone finds wrong with a checkpoint is known, by name, to all of them; none waits for ever."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.checkpoint.test_shares import E, Model, share_out, trained
from tests.train.support import on_ranks
from vlmoe_core.checkpoint.manifest import dump_json, read_manifest, write_manifest
from vlmoe_core.checkpoint.read import Part, read_checkpoint, read_newest
from vlmoe_core.checkpoint.restore import load_model_state, load_named_optimizer_state, named_optimizer_state
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_checkpoint
from vlmoe_core.errors import CheckpointError
from vlmoe_core.moe.experts import expert_shares
from vlmoe_core.moe.share import Share


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, optimizer = trained()
    state, moments = model.state_dict(), named_optimizer_state(optimizer, model.named_parameters())
    for step in (1, 2):
        path = write_checkpoint(
            tmp_path / "run", state, moments, RunState(step, {}), "seed: 0\n", lambda folder: None, max_shard_bytes=300
        )
    return path


def reseal(folder: Path) -> None:
    """A manifest that vouches for whatever now lies in the folder."""
    write_manifest(folder, int(time.time()), {})


def swap(folder: Path) -> str:
    """Give two shards of the model each other's names; that of the first."""
    left, right, *_ = shards(folder)
    left.rename(folder / "third")
    right.rename(left)
    (folder / "third").rename(right)
    return left.name


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def shard_of(folder: Path, key: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][key])


def rename_key(folder: Path, before: str, after: str, in_index: bool) -> None:
    """Another name for a tensor, in its file and, with `in_index`, in the index."""
    shard = shard_of(folder, before)
    tensors = load_file(shard)
    tensors[after] = tensors.pop(before)
    save_file(tensors, shard, metadata={"format": "pt"})
    if in_index:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][after] = index["weight_map"].pop(before)
        path.write_text(dump_json(index))
    reseal(folder)


def missing(folder: Path, key: str = "layer.experts.2.up.weight") -> str:
    shard = shard_of(folder, key)
    shard.unlink()
    return f"{shard.name} is missing"


def renamed(folder: Path) -> str:
    return f"{swap(folder)} has "


def swapped(folder: Path) -> str:
    name = swap(folder)
    reseal(folder)
    return f"{name}, where the index says it is"


def flipped(folder: Path) -> str:
    shard = max(folder.glob("optim-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return f"{shard.name} has other bytes than were written"


def out_of_range(folder: Path) -> str:
    rename_key(folder, "layer.experts.3.up.weight", "layer.experts.99.up.weight", in_index=True)
    return "'layer.experts.3.up.weight' is missing: there are experts up to 99"


def unlisted(folder: Path) -> str:
    rename_key(folder, "layer.experts.3.up.weight", "layer.experts.99.up.weight", in_index=False)
    return "'layer.experts.3.up.weight' is missing in "


DAMAGES: list[Callable[[Path], str]] = [missing, renamed, swapped, flipped, out_of_range, unlisted]


def messages(folders: list[Path], hidden: str | None = None) -> list[list[str]]:
    """For a child: what all processes are told of each checkpoint. The last of them does not find the file `hidden`."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if hidden is not None and rank == ranks - 1:
        is_file = Path.is_file
        Path.is_file = lambda self: self.name != hidden and is_file(self)  # type: ignore[method-assign]
    told = []
    for folder in folders:
        found: list[str | None] = [None] * ranks
        dist.all_gather_object(found, problem(folder, rank, ranks))
        told.append([message for message in found if message])
    dist.destroy_process_group()
    return told


def problem(folder: Path, rank: int, ranks: int) -> str | None:
    """What a process that holds its share of the experts finds wrong; null: nothing, and everything is loaded."""
    model = share_out(Model(), Share(rank * E // ranks, E // ranks, E))
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        found = read_newest(folder, Part(rank, ranks))
        assert found.optimizer is not None
        load_model_state(model, found.model)
        load_named_optimizer_state(optimizer, model.named_parameters(), found.optimizer, expert_shares(model))
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("ranks", [2, 4])
def test_damage_is_told_to_every_process(checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    folders, words = [], []
    for damage in DAMAGES:
        run = shutil.copytree(checkpoint.parents[1], tmp_path / damage.__name__)
        folders.append(run / "checkpoints" / checkpoint.name)
        words.append(damage(folders[-1]))
    answers = on_ranks(ranks, messages, [*folders, checkpoint])
    assert all(answer == answers[0] for answer in answers), answers
    for damage, folder, word, told in zip(DAMAGES, folders, words, answers[0][:-1], strict=True):
        assert told and word in told[0], (damage.__name__, told)
        assert told[0].endswith(f"; to go on from the one before: --resume {folder.with_name('step-00000001')}")
        assert len(told) == (1 if damage is flipped else ranks), "each file is hashed by one process"
    assert answers[0][-1] == [], "the whole one is read"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_file_that_one_process_alone_does_not_see(checkpoint: Path, ranks: int) -> None:
    for name in (shards(checkpoint)[0].name, "state.json"):
        answers = on_ranks(ranks, messages, [checkpoint], name)
        assert all(answer == answers[0] for answer in answers)
        ((told,),) = answers[0]
        assert f"{name} is missing" in told


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 50])
def test_parts_are_each_file_once_and_about_as_many_bytes(checkpoint: Path, ranks: int) -> None:
    manifest = read_manifest(checkpoint)
    parts = [Part(rank, ranks).of(manifest) for rank in range(ranks)]
    assert sorted(name for part in parts for name in part) == sorted(manifest.files)
    sizes = [sum(manifest.files[name].size for name in part) for part in parts]
    assert max(sizes) - min(sizes) <= max(record.size for record in manifest.files.values())


def test_a_part_hashes_its_own_files_alone(checkpoint: Path) -> None:
    """A bit that differs is seen by one of four; what is missing by all."""
    flipped(checkpoint)
    seen = []
    for rank in range(4):
        try:
            read_checkpoint(checkpoint, verify="sha256", part=Part(rank, 4))
        except CheckpointError as error:
            seen.append(str(error))
    assert len(seen) == 1 and "other bytes" in seen[0]
    missing(checkpoint)
    for rank in range(4):
        with pytest.raises(CheckpointError, match="is missing"):
            read_checkpoint(checkpoint, verify="sha256", part=Part(rank, 4))
