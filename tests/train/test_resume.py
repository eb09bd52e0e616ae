"""Interrupted and resumed = straight, bit for bit, wherever the interruption came."""

import shutil
import signal
from pathlib import Path

import pytest

from tests.hub.runs_support import model_folder
from tests.train.support import (
    Blow,
    Child,
    Scaled,
    assert_same_run,
    fresh_process,
    metrics,
    pretrain_child,
    tiny,
    train,
)
from vlmoe_core.checkpoint.layout import list_checkpoints, step_of
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.errors import CheckpointError, RecipeError, UsageError
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import Outcome, run_training
from vlmoe_core.train.session import RunOptions

LAST = 6
RUN, SESSION, FITTING = "vlmoe_core.train.run", "vlmoe_core.train.session", "vlmoe_core.train.fitting"
WRITE, FILES, LOG = "vlmoe_core.checkpoint.write", "vlmoe_core.checkpoint.files", "vlmoe_core.train.metrics:MetricsLog"
STEP, SAVING = f"{RUN}:Stepper", "vlmoe_core.train.saving"

# A save of the tiny recipe writes two sets of tensors; saves begin after the steps 2, 3 (the best so far), 4 and 6, and
# each is whole before the next begins.
BEFORE_THE_FIRST_CHECKPOINT = {
    "folder not yet made": Blow(SESSION, "start_folder", before=True),
    "recipe not yet renamed": Blow("pathlib:Path", "rename", before=True),
    "text tokenizer fitted": Blow(FITTING, "obtain_text"),
    "visual tokenizer fitted": Blow(FITTING, "obtain_visual"),
    "tokenizers not yet renamed": Blow(FITTING, "rename", before=True),
    "start evaluated": Blow(LOG, "write"),
    "one step": Blow(STEP, "__call__", 1),
    "first save, model written": Blow(SAVING, "write_files", 1),
    "first save, not yet renamed": Blow(WRITE, "put_in_place", 1, before=True),
}
AFTER_IT = {
    "first save done": ({2}, Blow(WRITE, "put_in_place", 1)),
    "third step, first save under way": ({None, 2}, Blow(STEP, "__call__", 3)),
    "third step evaluated": ({None, 2}, Blow(RUN, "evaluate", 2)),
    "second save begins": ({2}, Blow(SAVING, "open_checkpoint", 2)),
    "third save, optimiser written": ({3}, Blow(SAVING, "write_files", 6)),
    "third save done, nothing removed": ({4}, Blow(WRITE, "put_in_place", 3)),
    "a checkpoint half removed": ({4}, Blow("shutil", "rmtree", 2, before=True)),
    "fifth step, third save under way": ({3, 4}, Blow(STEP, "__call__", 5)),
    "last step": ({3, 4}, Blow(STEP, "__call__", 6)),
    "last save done": ({6}, Blow(WRITE, "put_in_place", 4)),
}


def newest_step(run: Path) -> int | None:
    found = list_checkpoints(run)
    return step_of(found[-1]) if found else None


@pytest.mark.parametrize("blow", BEFORE_THE_FIRST_CHECKPOINT.values(), ids=BEFORE_THE_FIRST_CHECKPOINT)
def test_killed_before_the_first_checkpoint(tmp_path: Path, straight: Path, blow: Blow) -> None:
    loaded, run = tiny(tmp_path), tmp_path / "run"
    assert Child(pretrain_child, loaded, run, None, blow).wait() == -signal.SIGKILL
    assert newest_step(run) is None
    train(loaded, run, resume="auto")
    assert_same_run(run, straight, LAST)


@pytest.mark.parametrize(("saved", "blow"), AFTER_IT.values(), ids=AFTER_IT)
def test_killed_after_the_first_checkpoint(tmp_path: Path, straight: Path, saved: set[int | None], blow: Blow) -> None:
    loaded, run = tiny(tmp_path), tmp_path / "run"
    assert Child(pretrain_child, loaded, run, None, blow).wait() == -signal.SIGKILL
    assert newest_step(run) in saved
    train(loaded, run, resume="auto")
    assert_same_run(run, straight, LAST)


def test_killed_again_and_again(tmp_path: Path, straight: Path) -> None:
    loaded, run = tiny(tmp_path), tmp_path / "run"
    for blow in (Blow(FITTING, "obtain_text"), Blow(STEP, "__call__", 3), Blow(STEP, "__call__", 1)):
        assert Child(pretrain_child, loaded, run, "auto", blow).wait() == -signal.SIGKILL
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    assert Child(pretrain_child, loaded, run, "auto", Blow(STEP, "__call__", 3)).wait() == -signal.SIGKILL
    train(loaded, run, resume="auto")
    assert_same_run(run, straight, LAST)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    tmp_path: Path, straight: Path, number: signal.Signals, workers: int
) -> None:
    loaded, run = tiny(tmp_path, f"data.workers={workers}"), tmp_path / "run"
    blow = Blow("vlmoe_core.objectives.kinds.masked:MaskedModelling", "counts", 9, signal=number)  # in the fifth step
    outcome = Child(pretrain_child, loaded, run, None, blow).answer()
    assert isinstance(outcome, Outcome)
    assert (outcome.step, outcome.finished, outcome.signal) == (5, False, number)
    assert newest_step(run) == 5
    train(loaded, run, resume="auto")
    assert_same_run(run, straight, LAST)


def test_a_finished_run_resumes_to_its_end_without_a_change(tmp_path: Path, straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    outcome = train(tiny(tmp_path), straight, resume="auto")
    assert outcome.finished and outcome.step == LAST
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_resume_from_an_earlier_checkpoint_goes_the_same_way_again(tmp_path: Path, straight: Path) -> None:
    """Later checkpoints go at once: else a kill would leave them as the newest, with metrics that were cut."""
    loaded, run = tiny(tmp_path, "train.keep_last=9"), tmp_path / "run"
    train(loaded, run)
    earlier = str(run / "checkpoints" / "step-00000002")
    assert Child(pretrain_child, loaded, None, earlier, Blow(STEP, "__call__", 1)).wait() == -signal.SIGKILL
    assert newest_step(run) == 2
    outcome = Child(pretrain_child, loaded, None, earlier).answer()
    assert isinstance(outcome, Outcome) and outcome.folder == run
    assert_same_run(run, straight, LAST)


def test_killed_while_later_checkpoints_go(tmp_path: Path, straight: Path) -> None:
    """One of three is gone: the newest of the others still has its lines of metrics."""
    loaded, run = tiny(tmp_path, "train.keep_last=9"), tmp_path / "run"
    train(loaded, run)
    earlier = str(run / "checkpoints" / "step-00000002")
    assert Child(pretrain_child, loaded, None, earlier, Blow("shutil", "rmtree", 1)).wait() == -signal.SIGKILL
    assert [step_of(path) for path in list_checkpoints(run)] == [2, 4, 6]
    train(loaded, run, resume="auto")
    assert_same_run(run, straight, LAST)


def test_nothing_goes_before_the_metrics_are_found_right(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(tmp_path, "train.keep_last=9"), run)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="put the whole file back"):
        train(tiny(tmp_path, "train.keep_last=9"), run, resume=str(run / "checkpoints" / "step-00000002"))
    assert [step_of(path) for path in list_checkpoints(run)] == [2, 3, 4, 6]


def test_overwrite_replaces_the_run(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    train(tiny(tmp_path, "train.steps=2", "seed=8"), run)
    (run / "notes.txt").write_text("a user's own")
    fresh_process()
    run_training(tiny(tmp_path), RunOptions(run, overwrite=True), Reporter())
    assert_same_run(run, straight, LAST)
    assert [p.name for p in list_checkpoints(run)] == [p.name for p in list_checkpoints(straight)]
    assert (run / "notes.txt").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give one of them"):
        run_training(tiny(tmp_path), RunOptions(tmp_path / "run", "auto", overwrite=True), Reporter())


def test_resume_and_out_must_mean_the_same_run(tmp_path: Path, straight: Path) -> None:
    with pytest.raises(UsageError, match=r"goes on in .*run, not in --out .*other; leave --out away"):
        train(tiny(tmp_path), tmp_path / "other", resume=str(straight))


def test_another_recipe_is_refused_by_field(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Child(pretrain_child, tiny(tmp_path), run, None, Blow(WRITE, "put_in_place", 1)).wait()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RecipeError, match=r"optim\.lr was 0\.01, is 0\.02.*give the same one to go on"):
        train(tiny(tmp_path, "optim.lr=0.02"), run, resume="auto")
    with pytest.raises(RecipeError, match=r"model\.moe\.text\.num_experts was 4, is 2"):
        train(tiny(tmp_path, "model.moe.text.num_experts=2"), run, resume=str(run))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_what_changes_no_number_may_change(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    Child(pretrain_child, tiny(tmp_path), run, None, Blow(STEP, "__call__", 5)).wait()
    train(tiny(tmp_path, "data.workers=1", "data.prefetch=2", "train.keep_last=5"), run, resume="auto")
    assert_same_run(run, straight, LAST)


def test_a_folder_with_a_run_is_refused(tmp_path: Path, straight: Path) -> None:
    before = metrics(straight)
    with pytest.raises(
        UsageError, match=r"already holds a run; continue it with --resume auto, replace it with --over"
    ):
        train(tiny(tmp_path), straight)
    assert metrics(straight) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for resume in (None, "auto"):
        with pytest.raises(UsageError, match="holds files that are no run"):
            train(tiny(tmp_path), tmp_path / "run", resume=resume)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_goes_on_from_a_checkpoint_without_its_run(tmp_path: Path, straight: Path) -> None:
    earlier = list_checkpoints(straight)[0]
    assert (step_of(earlier) or LAST) < LAST
    alone = model_folder(earlier, tmp_path / "model", with_optimizer=True)
    train(tiny(tmp_path), tmp_path / "run", resume=str(alone))
    ours, theirs = (read_checkpoint(list_checkpoints(run)[-1]) for run in (tmp_path / "run", straight))
    assert ours.state.step == LAST
    assert ours.optimizer is not None and theirs.optimizer is not None
    assert all(ours.model[name].equal(theirs.model[name]) for name in theirs.model)
    assert all(ours.optimizer[name].equal(theirs.optimizer[name]) for name in theirs.optimizer)
    with pytest.raises(UsageError, match="already holds a run; go on with it by --resume auto"):
        train(tiny(tmp_path), tmp_path / "run", resume=str(alone))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, straight: Path) -> None:
    alone = tmp_path / "step-00000006"
    shutil.copytree(straight / "checkpoints" / "step-00000006", alone)
    with pytest.raises(RecipeError, match=r"optim\.lr was"):
        train(tiny(tmp_path, "optim.lr=0.5"), tmp_path / "run", resume=str(alone))
    assert not (tmp_path / "run").exists()


def test_a_model_without_its_optimiser_is_no_checkpoint_to_go_on_from(tmp_path: Path, straight: Path) -> None:
    model = model_folder(straight / "checkpoints" / "step-00000006", tmp_path / "model")
    with pytest.raises(UsageError, match=r"without its optimiser.*--model"):
        train(tiny(tmp_path), tmp_path / "run", resume=str(model))


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Child(pretrain_child, tiny(tmp_path), run, None, Blow(WRITE, "put_in_place", 3)).wait()
    weights = run / "checkpoints" / "step-00000004" / "model-00001-of-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors.*--resume .*step-00000003"):
        train(tiny(tmp_path), run, resume="auto")


def test_the_scaler_is_saved_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmoe_core.train.parallel.Accelerator", Scaled)
    loaded = tiny(tmp_path, "train.keep_last=9")
    train(loaded, tmp_path / "straight")
    states = [read_checkpoint(p).state.scaler for p in list_checkpoints(tmp_path / "straight")]
    assert [(s["scale"], s["_growth_tracker"]) for s in states if s] == [
        (2.0**21, 0), (2.0**21, 1), (2.0**22, 0), (2.0**23, 0),
    ]  # fmt: skip
    train(loaded, tmp_path / "run")
    train(loaded, None, resume=str(tmp_path / "run" / "checkpoints" / "step-00000003"))
    assert_same_run(tmp_path / "run", tmp_path / "straight", LAST)
