from collections.abc import Callable
from pathlib import Path

import pytest

from vlmoe_core.checkpoint.layout import discard_after, latest_checkpoint, list_checkpoints, prune, step_folder
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.errors import CheckpointError, UsageError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with folders of steps 9, 100 and 123456789, and things that are no checkpoints."""
    for step in (100, 123_456_789, 9):
        step_folder(tmp_path, step).mkdir(parents=True)
    for other in ("step-00000300.partial", "step-00000009.removed", "step-7", "best"):
        (tmp_path / "checkpoints" / other).mkdir()
    (tmp_path / "checkpoints" / "step-00000400").write_text("a file")
    return tmp_path


def steps(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_lists_by_step_and_ignores_leftovers(run: Path) -> None:
    assert steps(list_checkpoints(run)) == ["step-00000009", "step-00000100", "step-123456789"]
    assert latest_checkpoint(run) == step_folder(run, 123_456_789)
    assert list_checkpoints(run / "nowhere") == [] and latest_checkpoint(run / "nowhere") is None


def test_resolve(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = step_folder(run, 123_456_789)
    assert resolve(run) == resolve(run / "checkpoints") == resolve(newest) == newest
    monkeypatch.chdir(step_folder(run, 9))
    assert resolve(Path()).resolve() == step_folder(run, 9).resolve()
    with pytest.raises(UsageError, match=r"no checkpoint at .*nowhere"):
        resolve(run / "nowhere")
    with pytest.raises(UsageError, match="best holds no checkpoint"):
        resolve(run / "checkpoints" / "best")
    with pytest.raises(CheckpointError, match="interrupted save"):
        resolve(run / "checkpoints" / "step-00000300.partial")


def test_resolve_takes_a_copy_under_any_name(checkpoint: Path) -> None:
    copy = checkpoint.rename(checkpoint.parent.parent / "my-model")
    assert resolve(copy) == copy


def test_prune_keeps_the_last_and_the_best(save: Callable[[int], Path]) -> None:
    run = max([save(step) for step in (1, 2, 3, 4, 5)]).parent.parent
    assert steps(prune(run, keep_last=2, best_step=2)) == ["step-00000001", "step-00000003"]
    assert steps(list_checkpoints(run)) == ["step-00000002", "step-00000004", "step-00000005"]
    assert prune(run, keep_last=7, best_step=None) == []
    with pytest.raises(ValueError, match="at least 1"):
        prune(run, keep_last=0, best_step=None)


def test_prune_leaves_what_is_held(save: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = max([save(step) for step in (1, 2, 3)]).parent.parent
    monkeypatch.chdir(run.parent)
    assert steps(prune(run, keep_last=1, best_step=None, held={Path("run/checkpoints/step-00000001")})) == [
        "step-00000002"
    ]
    assert steps(list_checkpoints(run)) == ["step-00000001", "step-00000003"]
    assert steps(prune(run, keep_last=1, best_step=None)) == ["step-00000001"]


def test_discard_after(save: Callable[[int], Path]) -> None:
    run = max([save(step) for step in (1, 2, 3)]).parent.parent
    assert steps(discard_after(run, 1)) == ["step-00000002", "step-00000003"]
    assert steps(list_checkpoints(run)) == ["step-00000001"]
