"""A checkpoint that is not what it was is refused, in the same words, by every process that would go on with it."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_refusals_on_ranks import flipped, missing, rename_key, renamed, shards, swapped
from tests.train.support import Child, on_ranks, pretrain_child, tiny
from vlmoe_core.checkpoint import locate, stored
from vlmoe_core.checkpoint.layout import list_checkpoints
from vlmoe_core.errors import CheckpointError, VlmoeError
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import Outcome, run_training
from vlmoe_core.train.session import RunOptions

FOUR_MICROS = "batch.size={image: 8, text: 8, pair: 8}"
EXPERT = "encoder.blocks.1.ffn.vision.experts.2.up.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes wrote its checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("run")
    loaded = tiny(folder, FOUR_MICROS, "train.steps=2", "train.save_every=1", "parallel.expert=2")
    answers = on_ranks(2, pretrain_child, loaded, folder / "run")
    assert all(isinstance(answer, Outcome) for answer in answers), answers
    return folder / "run"


def gone(folder: Path) -> str:
    return missing(folder, EXPERT)


def out_of_range(folder: Path) -> str:
    rename_key(folder, EXPERT, EXPERT.replace(".2.", ".99."), in_index=True)
    return f"'{EXPERT}' is missing: there are experts up to 99"


def hide(name: str) -> None:
    """Let this process not find a file."""
    is_file = Path.is_file
    Path.is_file = lambda self: self.name != name and is_file(self)  # type: ignore[method-assign]


def lose(name: str) -> None:
    """Let this process find a shard, and fail to open it once the run is built."""
    opened = []
    open_shard = stored._open_shard

    def opening(path: Path) -> Any:
        opened.append(path.name)
        if path.name == name and opened.count(name) > 1:
            raise CheckpointError(f"{path} is not a whole safetensors file: gone")
        return open_shard(path)

    stored._open_shard = opening


def refusals(loaded: LoadedRecipe, runs: list[Path], alone: tuple[str, str] | None = None) -> list[str | None]:
    """For a child: what it is told of each run that it would go on with. `alone`: what befalls the last process."""
    if alone is not None and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        {"hide": hide, "lose": lose}[alone[0]](alone[1])
    told: list[str | None] = []
    for folder in runs:
        try:
            run_training(loaded, RunOptions(folder, "auto"), Reporter())
            told.append(None)
        except VlmoeError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("ranks", [2, 4])
def test_damage(run: Path, tmp_path: Path, ranks: int) -> None:
    damages = [gone, renamed, swapped, flipped, out_of_range]
    folders, words = [], []
    for damage in damages:
        folders.append(shutil.copytree(run, tmp_path / damage.__name__))
        words.append(damage(list_checkpoints(folders[-1])[-1]))
    loaded = tiny(tmp_path, FOUR_MICROS, "train.steps=2", "train.save_every=1", f"parallel.expert={ranks}")
    answers = on_ranks(ranks, refusals, loaded, folders)
    assert all(answer == answers[0] for answer in answers), answers
    for folder, word, told in zip(folders, words, answers[0], strict=True):
        assert told is not None and word in told
        assert told.endswith(f"--resume {list_checkpoints(folder)[0]}")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("how", ["hide", "lose"])
def test_one_process_alone_cannot_read_it(run: Path, tmp_path: Path, ranks: int, how: str) -> None:
    shard = shards(list_checkpoints(run)[-1])[-1].name
    loaded = tiny(tmp_path, FOUR_MICROS, "train.steps=2", "train.save_every=1", f"parallel.expert={ranks}")
    answers = on_ranks(ranks, refusals, loaded, [run], (how, shard))
    assert all(answer == answers[0] for answer in answers), answers
    (told,) = answers[0]
    assert told is not None and shard in told and ("is missing" in told or "is not a whole" in told)


def shown_another(loaded: LoadedRecipe, out: Path, resume: str | None) -> str:
    """For a child: what it is told where the disk of the second process does not show the newest checkpoint yet."""
    if os.environ["RANK"] == "1":
        setattr(locate, "list_checkpoints", lambda run: list_checkpoints(run)[:-1])  # noqa: B010
    try:
        run_training(loaded, RunOptions(out, resume), Reporter())
    except VlmoeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how", ["resume", "init"])
def test_processes_that_find_different_checkpoints(run: Path, tmp_path: Path, how: str) -> None:
    """Each would go on with experts of another step."""
    if how == "resume":
        loaded = tiny(tmp_path, FOUR_MICROS, "train.steps=2", "train.save_every=1", "parallel.expert=2")
        answers = on_ranks(2, shown_another, loaded, shutil.copytree(run, tmp_path / "run"), str(tmp_path / "run"))
    else:
        loaded = tiny(tmp_path, FOUR_MICROS, "parallel.expert=2", f"init={run}")
        answers = on_ranks(2, shown_another, loaded, tmp_path / "new", None)
    assert answers[0] == answers[1] and "different checkpoints, of steps 1, 2: " in answers[0], answers


def test_what_is_refused_above_is_otherwise_read(run: Path, tmp_path: Path) -> None:
    loaded = tiny(tmp_path, FOUR_MICROS, "train.steps=2", "train.save_every=1")
    answer = Child(pretrain_child, loaded, shutil.copytree(run, tmp_path / "run"), "auto").answer()
    assert isinstance(answer, Outcome) and answer.finished
