"""A process is killed in the midst of a run: the others say so and end, and the run goes on from its checkpoint."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.train.support import Blow, Child, metrics, on_ranks, pretrain_child, start_ranks, tiny
from tests.train.test_ranks import FOUR_MICROS
from vlmoe_core.checkpoint.layout import list_checkpoints
from vlmoe_core.errors import TrainError, VlmoeError
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.lost import is_of_lost_process, lost_processes_told
from vlmoe_core.train.run import Outcome

MINUTE = 60.0
RECIPE = (*FOUR_MICROS, "train.eval_every=6", "train.save_every=1")
SHARED = "parallel.expert=2"
CUT = "parallel={expert: 2, shard: full}"
IN_A_STEP = "vlmoe_core.train.step:Stepper"
ON_THE_WAY = "vlmoe_core.moe.exchange:Exchange"


def struck(loaded: LoadedRecipe, out: Path, rank: int, blow: Blow) -> tuple[str, str, str | None]:
    """For a child: one rank is hit; the kind and the words of the error that the others end with, and its cause."""
    if os.environ["RANK"] == str(rank):
        blow.prepare()
    try:
        outcome: Outcome = pretrain_child(loaded, out)
    except VlmoeError as error:
        return type(error).__name__, str(error), type(error.__cause__).__name__
    return "none", f"step {outcome.step}", None


def strike(ranks: int, loaded: LoadedRecipe, out: Path, rank: int, blow: Blow) -> tuple[list[Any], float]:
    """What each rank tells, null for the one that was killed, and the seconds until the last one has ended."""
    children = start_ranks(ranks, struck, loaded, out, rank, blow)
    assert children[rank].wait() == -9
    killed = time.monotonic()
    answers = [None if number == rank else child.answer() for number, child in enumerate(children)]
    return answers, time.monotonic() - killed


BLOWS = {
    "2 ranks, forward and backward": (2, 1, SHARED, Blow(IN_A_STEP, "_backward", 9)),
    "4 ranks, tokens on their way": (4, 2, SHARED, Blow(ON_THE_WAY, "send_back", 19, before=True)),
    "4 ranks, before the update": (4, 0, CUT, Blow(IN_A_STEP, "_update", 4, before=True)),
}
"""Ranks, who is hit, the mesh, and when: after three steps, so that a checkpoint is there."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody hit, of one process."""
    folder = tmp_path_factory.mktemp("straight")
    Child(pretrain_child, tiny(folder, *RECIPE), folder / "run").answer()
    return folder / "run"


@pytest.fixture(scope="module")
def hit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], float, Path]]:
    """What the ranks tell, how long it took, and the run folder, by the names of BLOWS."""
    found = {}
    for name, (ranks, rank, mesh, blow) in BLOWS.items():
        folder = tmp_path_factory.mktemp("hit")
        answers, seconds = strike(ranks, tiny(folder, *RECIPE, mesh), folder / "run", rank, blow)
        found[name] = answers, seconds, folder / "run"
    return found


@pytest.mark.parametrize("name", list(BLOWS))
def test_the_others_end_within_a_minute_with_one_clear_error(
    hit: dict[str, tuple[list[Any], float, Path]], name: str
) -> None:
    ranks, rank, _, _ = BLOWS[name]
    answers, seconds, run = hit[name]
    assert seconds < MINUTE
    for number, answer in enumerate(answers):
        if number == rank:
            continue
        kind, message, cause = answer
        assert (kind, cause) == ("TrainError", "RuntimeError"), message
        assert message.startswith(f"process {number} (of {ranks}, counted from 0) can't go on: another one ended")
        assert "--resume auto" in message and "onnection" in message
        assert "pair.cc" not in message and "\n" not in message and len(message) < 500
    assert list_checkpoints(run)


@pytest.mark.parametrize(
    ("name", "ranks", "mesh"),
    [
        ("2 ranks, forward and backward", 2, SHARED),
        ("2 ranks, forward and backward", 4, "parallel.expert=4"),
        ("4 ranks, tokens on their way", 1, "parallel.expert=1"),
        ("4 ranks, before the update", 2, SHARED),
    ],
)
def test_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, hit: dict[str, tuple[list[Any], float, Path]], straight: Path, name: str, ranks: int, mesh: str
) -> None:
    """On as many processes or on others; every loss is that of the run which nobody hit."""
    run = tmp_path / "run"
    shutil.copytree(hit[name][2], run)
    outcomes = on_ranks(ranks, pretrain_child, tiny(tmp_path, *RECIPE, mesh), run, "auto")
    assert [getattr(outcome, "step", outcome) for outcome in outcomes] == [6] * ranks
    for line, expected in zip(metrics(run), metrics(straight), strict=True):
        assert (line["split"], line["step"]) == (expected["split"], expected["step"])
        losses = {key: value for key, value in expected.items() if key.startswith("loss/")}
        assert {key: line[key] for key in losses} == pytest.approx(losses, abs=1e-4)


LOST = (
    RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:25305. This is typically"),
    RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5162: Connection reset by peer. This is"),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation"),
    RuntimeError("[/gloo/transport/tcp/pair.cc:609] Write error: Broken pipe"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, ncclRemoteError: A call failed possibly due to"),
    dist.DistBackendError("NCCL communicator was aborted on rank 3."),
    dist.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE"),
    dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cuda//0"),
    dist.DistNetworkError("failed to recv, got 0 bytes: Connection was reset by peer"),
)
OTHER = (
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    ConnectionResetError("Connection reset by peer"),
    dist.DistNetworkError("The server socket has failed to listen: port 29500, EADDRINUSE, address already in use"),
    dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0"),
)


@pytest.mark.parametrize("error", LOST, ids=str)
def test_what_tells_of_a_lost_process(error: Exception) -> None:
    assert is_of_lost_process(error)
    with (
        pytest.raises(TrainError, match=r"^this process can't go on: .*--resume auto") as caught,
        lost_processes_told(),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_what_tells_of_something_else(error: Exception) -> None:
    assert not is_of_lost_process(error)
    with pytest.raises(type(error)) as caught, lost_processes_told():
        raise error
    assert caught.value is error
