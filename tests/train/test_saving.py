"""Each tensor is written by one rank, while the run goes on; whatever fails, all ranks learn of it and none waits."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tests.train.support import Blow, assert_same_run, on_ranks, pretrain_child, start_ranks, tensors, tiny
from vlmoe_core.checkpoint.layout import list_checkpoints, step_of
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.restore import named_optimizer_state
from vlmoe_core.checkpoint.shards import write_files
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import Companions, write_checkpoint
from vlmoe_core.errors import CheckpointError, DataError, TrainError
from vlmoe_core.moe.experts import expert_shares
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train import saving as saving_module
from vlmoe_core.train.metrics import MetricsLog
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import Outcome, Trainer
from vlmoe_core.train.saving import Keeping, Saving
from vlmoe_core.train.session import RunOptions, Session, open_session
from vlmoe_core.train.step import Stepper

SAVING, WRITE = "vlmoe_core.train.saving", "vlmoe_core.checkpoint.write"
FOUR_MICROS = "batch.size={image: 8, text: 8, pair: 8}"
DENSE, CUT = [(1, 1, "none"), (2, 1, "none"), (2, 2, "none"), (4, 2, "none")], [(2, 1), (2, 2), (4, 2)]
MESHES = [*DENSE, *((ranks, expert, "full") for ranks, expert in CUT)]


@dataclass(frozen=True)
class Local:
    """What one rank has of a tensor."""

    values: NDArray[Any]
    cut: int | None
    """Along which dimension the ranks of its mesh cut it."""
    first_expert: int | None
    """Number of the first expert; null: it is no expert's."""
    mesh: tuple[int, ...]
    """The ranks among which it is cut, in order."""


@dataclass(frozen=True)
class Rank:
    """What one rank had when it began to save, and what it was to write."""

    held: dict[str, Local]
    owned: int
    """Bytes."""
    keys: int
    tied: int


def save_and_go_on(loaded: LoadedRecipe, run: Path) -> Rank:
    """For a child: two steps, then a save, while which everything is overwritten."""
    session = open_session(loaded, RunOptions(run), Reporter())
    trainer = Trainer(session, Reporter())
    trainer.saving.max_shard_bytes = 8192
    micros = session.train_micros()
    per_step = loaded.recipe.batch.num_micro // session.accelerator.num_processes
    for step in range(2):
        trainer.stepper(step, [next(micros) for _ in range(per_step)])
    session.state = RunState(step=2, positions={"pair": 8}, recipe="tiny")
    held = {name: local(session, name, tensor) for name, tensor in everything(session).items()}
    trainer._save()
    with torch.no_grad():
        for tensor in everything(session).values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    trainer.saving.finish()
    plans, rank = trainer.saving._plans, session.accelerator.process_index
    written = [run / "checkpoints" / "step-00000002" / name for plan in plans for name in plan.files[rank]]
    owned = [len(plan.owned(rank)) for plan in plans]
    return Rank(held, sum(path.stat().st_size for path in written), sum(owned), sum(len(p.written) for p in plans))


def everything(session: Session) -> dict[str, Tensor]:
    """Weights and moments as they are in this rank's memory."""
    moments = named_optimizer_state(session.optimizer, session.objective.named_parameters())
    model = {f"model/{name}": tensor for name, tensor in session.objective.state_dict().items()}
    return model | {f"optimizer/{name}": tensor for name, tensor in moments.items()}


def local(session: Session, name: str, tensor: Tensor) -> Local:
    """A copy of this rank's part, and where it belongs."""
    shares = {f".{layer}.": share.first for layer, share in expert_shares(session.objective).items()}
    first = next((number for layer, number in shares.items() if layer in name.replace("/", ".")), None)
    if not isinstance(tensor, DTensor):
        return Local(
            tensor.detach().numpy().copy(), None, first if tensor.ndim else None, (session.accelerator.process_index,)
        )
    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    return Local(
        tensor.to_local().detach().numpy().copy(), placement.dim, first, tuple(tensor.device_mesh.mesh.tolist())
    )


def put_together(ranks: list[Rank], name: str) -> NDArray[Any]:
    """A tensor as one process would have it, from what all ranks have. Replicas must be the same bit for bit."""
    shares: dict[int, NDArray[Any]] = {}
    for rank in ranks:
        mine = rank.held[name]
        parts = [ranks[other].held[name].values for other in mine.mesh]
        whole = parts[0] if mine.cut is None else np.concatenate(parts, mine.cut)
        assert np.array_equal(shares.setdefault(mine.first_expert or 0, whole), whole)
    return shares[0] if len(shares) == 1 else np.concatenate([shares[first] for first in sorted(shares)])


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: f"{mesh[0]} ranks, expert {mesh[1]}, shard {mesh[2]}")
def mesh(request: pytest.FixtureRequest) -> tuple[int, int, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(mesh: tuple[int, int, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rank]]:
    """A run folder with one checkpoint, and what each rank had."""
    folder = tmp_path_factory.mktemp("saved")
    ranks, expert, shard = mesh
    loaded = tiny(folder, FOUR_MICROS, f"parallel={{expert: {expert}, shard: {shard}}}")
    answers = on_ranks(ranks, save_and_go_on, loaded, folder / "run")
    assert [type(answer) for answer in answers] == [Rank] * ranks, answers
    return folder / "run", answers


def test_what_is_on_disk_is_what_the_ranks_had_together(
    mesh: tuple[int, int, str], saved: tuple[Path, list[Rank]]
) -> None:
    run, ranks = saved
    on_disk = tensors(run, 2)
    assert on_disk.keys() == ranks[0].held.keys()
    for name, tensor in on_disk.items():
        assert np.array_equal(tensor.numpy(), put_together(ranks, name)), name
        assert not name.endswith("weight") or tensor.any(), name
    experts = {rank.held["model/encoder.blocks.1.ffn.vision.experts.up.weight"].first_expert for rank in ranks}
    assert len(experts) == mesh[1]
    cut = ranks[0].held["model/encoder.blocks.0.attention.qkv.weight"].cut
    assert cut == (0 if mesh[2] == "full" else None)


def test_every_key_is_written_once_and_the_work_is_shared(saved: tuple[Path, list[Rank]]) -> None:
    run, ranks = saved
    (folder,) = list_checkpoints(run)
    keys: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys += [f"{path.name.split('-')[0]}/{key}" for key in file.keys()]  # noqa: SIM118
    checkpoint = read_checkpoint(folder, verify="sha256")
    assert checkpoint.optimizer is not None
    assert len(keys) == len(set(keys)) == len(checkpoint.model.infos) + len(checkpoint.optimizer.infos)
    assert [rank.tied for rank in ranks] == [len(keys)] * len(ranks) and sum(rank.keys for rank in ranks) == len(keys)
    assert max(rank.owned for rank in ranks) <= 1.5 * sum(rank.owned for rank in ranks) / len(ranks)
    for stem in ("model", "optim"):
        shards = sorted(path.name for path in folder.glob(f"{stem}-*.safetensors"))
        assert shards == [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        assert len(shards) >= len(ranks)


def test_one_rank_writes_the_bytes_that_are_written_at_once(tmp_path: Path, tmp_path_factory: Any) -> None:
    model = {"w": torch.randn(30, 20), "l.experts.up.weight": torch.randn(5, 40, 3), "seen": torch.tensor([1, 2])}
    model["head"], model["turned"] = model["w"], model["w"].t()
    moments = {f"{kind}.{name}": torch.randn_like(t.float()) for name, t in model.items() for kind in ("a", "b")}
    moments["step.l.experts.up.weight"] = torch.tensor(3.0)
    state = RunState(step=4, positions={})
    folders = [write_checkpoint(tmp_path / "once", model, moments, state, "seed: 0\n", write_nothing, 2000)]
    with Saving(Keeping(tmp_path / "meanwhile", 1, saved=folders.append), 0, 1, 2000) as saving:
        saving.begin(Companions(state, "seed: 0\n", write_nothing), model, moments, {})
    once, meanwhile = ({p.name: p.read_bytes() for p in f.iterdir() if p.is_file()} for f in folders)
    assert len(once) > 5 and once.pop("manifest.json") and meanwhile.pop("manifest.json")
    assert once == meanwhile
    assert read_checkpoint(folders[0]).manifest.files == read_checkpoint(folders[1]).manifest.files


def write_nothing(folder: Path) -> None:
    """There are no tokenizers."""


@dataclass
class Toy:
    """One rank that saves one tensor."""

    run: Path
    saving: Saving
    told: list[Path]
    weight: Tensor

    def begin(self, step: int) -> None:
        self.weight.fill_(step)
        companions = Companions(RunState(step=step, positions={}), "seed: 0\n", write_nothing)
        self.saving.begin(companions, {"w": self.weight}, {"step.w": torch.tensor(float(step))}, {})
        self.weight.fill_(-1)

    def steps(self) -> list[int]:
        """The steps whose checkpoints are whole, and hold what they should."""
        found = [read_checkpoint(path, verify="sha256") for path in list_checkpoints(self.run)]
        assert all(bool((c.model["w"] == c.state.step).all()) for c in found)
        return [c.state.step for c in found]

    def leftovers(self) -> list[str]:
        return [path.name for path in (self.run / "checkpoints").iterdir() if step_of(path) is None]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    told: list[Path] = []
    keeping = Keeping(tmp_path, keep_last=2, saved=told.append)
    return Toy(tmp_path, Saving(keeping, rank=0, ranks=1), told, torch.zeros(100))


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_save_goes_on_as_the_steps_tell(toy: Toy) -> None:
    toy.saving.hear(toy.saving.tell())
    toy.begin(1)
    wait_for(lambda: toy.saving.tell()["written"])
    assert toy.steps() == [] and toy.leftovers() == ["step-00000001.partial"]
    toy.saving.hear(toy.saving.tell())
    assert toy.told == []
    wait_for(lambda: toy.saving.tell()["whole"])
    assert toy.steps() == [1]
    toy.saving.hear(toy.saving.tell())
    assert toy.told == [toy.run / "checkpoints" / "step-00000001"] and not any(toy.saving.tell().values())
    toy.saving.hear(toy.saving.tell())
    assert len(toy.told) == 1


def test_no_step_waits_for_a_process_that_still_writes(tmp_path: Path) -> None:
    toy = Toy(tmp_path, Saving(Keeping(tmp_path, keep_last=2), rank=0, ranks=2), [], torch.zeros(3))
    toy.begin(1)
    wait_for(lambda: toy.saving.tell()["written"])
    toy.saving.hear(toy.saving.tell())
    assert toy.saving.tell() == {"written": 1, "whole": 0} and toy.saving._finishing is None, "one of two has written"
    toy.saving.hear({"written": 2, "whole": 0})
    toy.saving.finish()
    assert toy.steps() == [1]


def test_one_at_a_time_in_the_same_memory_and_old_ones_go(toy: Toy) -> None:
    places = set()
    for step in (1, 2, 3, 4):
        toy.begin(step)
        assert toy.steps() == [s for s in (1, 2, 3) if step - 3 <= s < step][-2:]
        places |= {copy.data_ptr() for s in toy.saving._snapshots.values() for copy in s._copies.values()}
    toy.saving.finish()
    toy.saving.finish()
    assert toy.steps() == [3, 4] and toy.leftovers() == [] and len(toy.told) == 4
    assert len(places) == 2


def test_the_best_and_those_that_are_held_stay(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, keep_last=1, held=lambda: [tmp_path / "checkpoints" / "step-00000001"])
    toy = Toy(tmp_path, Saving(keeping, rank=0, ranks=1), [], torch.zeros(3))
    for step in (1, 2, 3, 4):
        state = RunState(step=step, positions={}, best_step=2)
        toy.weight.fill_(step)
        toy.saving.begin(Companions(state, "", write_nothing), {"w": toy.weight}, {}, {})
    toy.saving.finish()
    assert toy.steps() == [1, 2, 4]


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write_files", "finish_checkpoint"])
def test_a_failure_is_raised_at_the_next_meeting(toy: Toy, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    toy.begin(1)
    toy.saving.finish()
    with monkeypatch.context() as patch:
        patch.setattr(saving_module, where, full)
        toy.begin(2)
        with pytest.raises(CheckpointError, match=r"step-00000002.*No space left.*earlier checkpoints are untouched$"):
            wait_for(lambda: toy.saving.hear(toy.saving.tell()))
    assert toy.steps() == [1] and toy.leftovers() == []
    toy.begin(3)
    toy.saving.finish()
    assert toy.steps() == [1, 3]


def test_a_disk_that_is_not_shared_is_told(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving_module, "open_checkpoint", lambda target: target.with_name("elsewhere"))
    toy.begin(1)
    with pytest.raises(CheckpointError, match=r"process 0 does not find elsewhere: all machines .* share its disk"):
        toy.saving.finish()


def test_tensors_that_can_not_be_saved_leave_nothing(toy: Toy) -> None:
    toy.begin(1)
    companions = Companions(RunState(step=2, positions={}), "seed: 0\n", write_nothing)
    with pytest.raises(CheckpointError, match="'w' can't be saved"):
        toy.saving.begin(companions, {"w": torch.eye(2).to_sparse()}, {}, {})
    assert toy.steps() == [1] and toy.leftovers() == []


def test_what_can_not_be_removed_is_told(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving_module, "prune", full)
    toy.begin(1)
    with pytest.raises(TrainError, match=r"step-00000001 is whole, but older ones could not be removed: .*No space"):
        toy.saving.finish()
    assert toy.steps() == [1]


def test_what_was_begun_before_an_error_is_made_whole(toy: Toy) -> None:
    with pytest.raises(TrainError), toy.saving:
        toy.begin(1)
        raise TrainError("the loss is not finite")
    assert toy.steps() == [1]


def test_a_second_ctrl_c_does_not_wait(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(*arguments: object) -> None:
        go_on.wait(20)
        full()

    monkeypatch.setattr(saving_module, "write_files", slow)
    with pytest.raises(KeyboardInterrupt), toy.saving:
        toy.begin(1)
        raise KeyboardInterrupt
    assert toy.steps() == [] and not toy.saving.tell()["written"], "it is still being written"
    go_on.set()


def failing_child(loaded: LoadedRecipe, run: Path, rank: int, function: str, call: int) -> Outcome:
    """For a child: a run in which the disk of one rank is full at some call."""
    calls, works = [0], getattr(saving_module, function)

    def sometimes(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            full()
        return works(*arguments)

    if os.environ["RANK"] == str(rank):
        setattr(saving_module, function, sometimes)
    return pretrain_child(loaded, run)


@pytest.mark.parametrize(("rank", "function", "call"), [(1, "write_files", 4), (0, "finish_checkpoint", 2)])
def test_the_failure_of_one_rank_is_that_of_all(tmp_path: Path, rank: int, function: str, call: int) -> None:
    """In the second save, after step 3."""
    run = tmp_path / "run"
    errors = on_ranks(2, failing_child, tiny(tmp_path), run, rank, function, call)
    assert [(type(error), error.of_all) for error in errors] == [(CheckpointError, True)] * 2, errors
    assert str(errors[0]) == str(errors[1])
    assert "step-00000003 could not be written: [Errno 28] No space left on device; earlier" in str(errors[0])
    (folder,) = (run / "checkpoints").iterdir()
    assert read_checkpoint(folder, verify="sha256").state.step == 2


def unwritable_child(loaded: LoadedRecipe, run: Path) -> Outcome:
    """For a child: a run whose metrics can't be written after step 3, while the checkpoint of step 2 is."""
    write = MetricsLog.write

    def refusing(self: MetricsLog, record: Any) -> None:
        if record["step"] == 3:
            raise TrainError("metrics.jsonl can't be written")
        write(self, record)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write_files(*arguments)

    for owner, function, stand_in in ((MetricsLog, "write", refusing), (saving_module, "write_files", slowly)):
        setattr(owner, function, stand_in)
    return pretrain_child(loaded, run)


def test_an_error_of_the_first_rank_while_others_train(tmp_path: Path) -> None:
    """All are told, and together they make whole what was begun."""
    errors = on_ranks(2, unwritable_child, tiny(tmp_path), tmp_path / "run")
    assert [str(error) for error in errors] == ["metrics.jsonl can't be written"] * 2
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [2]


def leaving_child(loaded: LoadedRecipe, run: Path) -> Outcome:
    """For a child: rank 1 alone meets an error in step 3, while the checkpoint of step 2 is written."""
    step = Stepper.__call__

    def failing(self: Stepper, number: int, *arguments: Any) -> Any:
        if number == 2 and os.environ["RANK"] == "1":
            raise DataError("met by one alone")
        return step(self, number, *arguments)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write_files(*arguments)

    for owner, function, stand_in in ((Stepper, "__call__", failing), (saving_module, "write_files", slowly)):
        setattr(owner, function, stand_in)
    return pretrain_child(loaded, run)


def test_an_error_of_one_rank_alone(tmp_path: Path) -> None:
    """It leaves without waiting for the other, which then finds it gone."""
    errors = on_ranks(2, leaving_child, tiny(tmp_path), tmp_path / "run")
    assert [type(error) for error in errors] == [TrainError, DataError], errors
    assert "another one ended" in str(errors[0]) and not errors[1].of_all
    assert list_checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize(("expert", "shard"), [(1, "none"), (2, "none"), (2, "full")])
def test_killed_while_ranks_write(tmp_path: Path, expert: int, shard: str) -> None:
    """In the third save, after step 4: one set of tensors is on disk."""
    loaded = tiny(tmp_path, f"parallel={{expert: {expert}, shard: {shard}}}")
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert [o.step for o in on_ranks(2, pretrain_child, loaded, straight)] == [6, 6]
    children = start_ranks(2, pretrain_child, loaded, run, None, Blow(SAVING, "write_files", 5))
    assert [child.wait() for child in children] == [-signal.SIGKILL] * 2
    assert [step_of(path) for path in list_checkpoints(run)] == [2, 3]
    assert (run / "checkpoints" / "step-00000004.partial").is_dir()
    assert [o.step for o in on_ranks(2, pretrain_child, loaded, run, "auto")] == [6, 6]
    assert_same_run(run, straight, 6)
    assert not list((run / "checkpoints").glob("*.partial"))
