"""A run stopped on some processes goes on with others: the same losses, and every tensor where it belongs."""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.train.support import Blow, Child, assert_same_bits, metrics, on_ranks, pretrain_child, tensors, tiny
from vlmoe_core.checkpoint.layout import list_checkpoints, step_folder
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.reshard import Cut, reshard
from vlmoe_core.checkpoint.restore import named_optimizer_state
from vlmoe_core.moe.experts import expert_shares
from vlmoe_core.moe.share import Share
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train import run as training
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import Outcome, Trainer
from vlmoe_core.train.session import RunOptions, Session, open_session

LAST, PART = 6, 2
"""Steps of a run, and of each part of it."""
RECIPE = (
    "batch.size={image: 8, text: 8, pair: 8}",
    f"train.steps={LAST}",
    f"train.eval_every={LAST}",
    f"train.save_every={LAST}",
    "train.keep_last=9",
)
BIASED = "model.moe.vision.router={name: bias-balanced, update_rate: 0.05}"
"""A router with a buffer that changes."""


@dataclass(frozen=True)
class Stage:
    """A part of a run."""

    ranks: int
    expert: int
    shard: str
    until: int

    @property
    def parallel(self) -> str:
        return f"parallel={{expert: {self.expert}, shard: {self.shard}}}"


@dataclass(frozen=True)
class Found:
    """What a process had in memory when it had opened the run, and how its part ended."""

    outcome: Outcome
    held: dict[str, NDArray[np.generic]]
    shares: dict[str, Share]
    sharded: int


def stage_child(loaded: LoadedRecipe, out: Path, resume: str | None, until: int) -> Found:
    """For a child: go on with a run until a signal ends it after a step; what was in memory before the first one."""
    if until < LAST:
        Blow("vlmoe_core.train.step:Stepper", "__call__", PART, before=True, signal=15).prepare()
    held: dict[str, NDArray[np.generic]] = {}
    shares: dict[str, Share] = {}
    sharded: list[str] = []

    def watched(*arguments: Any) -> Session:
        session = open_session(*arguments)
        held.update(in_memory(session))
        shares.update(expert_shares(session.objective))
        sharded.extend(name for name, p in session.objective.named_parameters() if isinstance(p, DTensor))
        return session

    training.open_session = watched  # type: ignore[assignment,attr-defined]
    outcome = pretrain_child(loaded, out, resume)
    return Found(outcome, held, shares, len(sharded))


def in_memory(session: Session) -> dict[str, NDArray[np.generic]]:
    """Weights and moments as `tensors` names those of a checkpoint; sharded ones are gathered."""
    model = session.objective.state_dict()
    moments = named_optimizer_state(session.optimizer.optimizer, session.objective.named_parameters())
    named = {f"model/{name}": tensor for name, tensor in model.items()}
    named |= {f"optimizer/{name}": tensor for name, tensor in moments.items()}
    return {name: together(tensor).clone().numpy() for name, tensor in named.items()}


@torch.no_grad()
def together(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    answer = Child(pretrain_child, tiny(folder, *RECIPE, BIASED), folder / "run").answer()
    assert isinstance(answer, Outcome), answer
    return folder / "run"


def go(folder: Path, stage: Stage, begun: bool) -> list[Found]:
    loaded = tiny(folder, *RECIPE, BIASED, stage.parallel)
    resume = "auto" if begun else None
    found = on_ranks(stage.ranks, stage_child, loaded, folder / "run", resume, stage.until)
    assert all(isinstance(answer, Found) for answer in found), found
    assert [answer.outcome.step for answer in found] == [stage.until] * stage.ranks
    return found


def assert_holds(found: list[Found], saved: dict[str, Tensor], stage: Stage) -> None:
    """Each process has its experts and all else, bit for bit as they are on disk."""
    for rank, answer in enumerate(found):
        assert answer.held.keys() == saved.keys()
        assert (answer.sharded > 0) == (stage.shard == "full" and stage.ranks > 1)
        for share in answer.shares.values():
            count = share.total // stage.expert
            assert share == Share(rank % stage.expert * count, count, share.total)
        wrong = [name for name, tensor in saved.items() if answer.held[name].tobytes() != bits(name, tensor, answer)]
        assert wrong == []


def bits(name: str, tensor: Tensor, found: Found) -> bytes:
    """The part of a tensor on disk that a process holds."""
    shares = [share for layer, share in found.shares.items() if f"{layer}." in name]
    mine = tensor[shares[0].first : shares[0].first + shares[0].count] if shares and tensor.ndim else tensor
    return mine.contiguous().numpy().tobytes()


CHAINS = [
    [Stage(2, 2, "none", 2), Stage(1, 1, "none", 4), Stage(4, 4, "none", LAST)],
    [Stage(2, 2, "full", 2), Stage(1, 1, "full", 4), Stage(4, 2, "full", LAST)],
    [Stage(2, 1, "full", 2), Stage(1, 1, "none", 4), Stage(4, 4, "full", LAST)],
    [Stage(4, 2, "none", 2), Stage(2, 2, "full", 4), Stage(4, 1, "full", LAST)],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(f"{s.ranks}.{s.expert}.{s.shard}" for s in chain))
def test_saved_on_some_resumed_on_others(tmp_path: Path, straight: Path, chain: list[Stage]) -> None:
    run = tmp_path / "run"
    for number, stage in enumerate(chain):
        found = go(tmp_path, stage, begun=number > 0)
        if number > 0:
            assert_holds(found, tensors(run, chain[number - 1].until), stage)
        assert read_checkpoint(step_folder(run, stage.until), verify="sha256").state.step == stage.until
    lines, expected = metrics(run), metrics(straight)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        losses = {key: value for key, value in wanted.items() if key.startswith(("loss/", "balance/", "baseline/"))}
        assert {key: line[key] for key in losses} == pytest.approx(losses, abs=1e-4)


def again_child(loaded: LoadedRecipe, run: Path) -> str:
    """For a child: open a run and save it as it is."""
    trainer = Trainer(open_session(loaded, RunOptions(run, "auto"), Reporter()), Reporter())
    trainer._save()
    trainer.saving.finish()
    return "saved"


@pytest.fixture(scope="module", params=[Stage(4, 1, "full", 2), Stage(4, 2, "none", 2)], ids=str)
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoint of one mesh."""
    folder = tmp_path_factory.mktemp("begun")
    go(folder, request.param, begun=False)
    return folder / "run"


@pytest.mark.parametrize("stage", [Stage(2, 1, "full", 2), Stage(4, 2, "full", 2), Stage(4, 4, "none", 2)], ids=str)
def test_saved_resumed_and_saved_again_is_the_same(begun: Path, tmp_path: Path, stage: Stage) -> None:
    """Bit for bit: processes read different files, and gather what they read."""
    run = shutil.copytree(begun, tmp_path / "run")
    loaded = tiny(tmp_path, *RECIPE, BIASED, stage.parallel)
    assert on_ranks(stage.ranks, again_child, loaded, run) == ["saved"] * stage.ranks
    assert_same_bits(tensors(run, 2), tensors(begun, 2))


def ending_child(loaded: LoadedRecipe, run: Path) -> list[str]:
    """For a child: what trained and is still there when the processes leave their group."""
    destroy, left = dist.destroy_process_group, []

    def watched() -> None:
        wrappers = (DistributedDataParallel, FSDPModule, Trainer)
        left.extend(type(one).__name__ for one in gc.get_objects() if issubclass(type(one), wrappers))
        destroy()

    setattr(dist, "destroy_process_group", watched)  # noqa: B010
    outcome = pretrain_child(loaded, run)
    return [*left, f"step {outcome.step}"]


@pytest.mark.parametrize("parallel", ["parallel.expert=1", "parallel={expert: 2, shard: full}"])
def test_nothing_that_trained_outlives_the_group(tmp_path: Path, parallel: str) -> None:
    """The last owner of a group must not be one of Python's objects: see `end_processes`."""
    loaded = tiny(tmp_path, *RECIPE, parallel)
    assert on_ranks(2, ending_child, loaded, tmp_path / "run") == [[f"step {LAST}"]] * 2


def test_resumed_from_a_copy_in_other_files(tmp_path: Path) -> None:
    """What `vlmoe checkpoint reshard` wrote is a checkpoint like any other, for any number of processes."""
    first, then = Stage(2, 2, "none", 2), Stage(2, 1, "full", LAST)
    go(tmp_path, first, begun=False)
    copy = tmp_path / "moved"
    (step,) = list_checkpoints(tmp_path / "run")
    told = reshard(step, copy, Cut(4, 4))
    assert told.step == 2 and len(list(copy.glob("model-*.safetensors"))) == 4
    loaded = tiny(tmp_path, *RECIPE, BIASED, then.parallel)
    found = on_ranks(then.ranks, stage_child, loaded, tmp_path / "again", str(copy), then.until)
    assert [answer.outcome.folder for answer in found] == [tmp_path / "again"] * 2, found
    assert_holds(found, tensors(tmp_path / "run", 2), then)
