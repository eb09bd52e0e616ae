"""Where the checkpoints of a run lie: RUN/checkpoints/step-00000100/. A folder with such a name is whole."""

import re
import shutil
from pathlib import Path

from vlmoe_core.checkpoint.files import PARTIAL, REMOVED, remove_folder
from vlmoe_core.errors import CheckpointError, UsageError

MANIFEST = "manifest.json"
STATE = "state.json"
RECIPE = "recipe.yaml"
TOKENIZERS = "tokenizers"
MODEL = "model"
OPTIMIZER = "optim"

STEP_NAME = re.compile(r"step-(\d{8,})")
LEFTOVER_NAME = re.compile(rf"step-\d{{8,}}({re.escape(PARTIAL)}|{re.escape(REMOVED)})")


def checkpoints_folder(run: Path) -> Path:
    """The folder of a run that holds its checkpoints."""
    return run / "checkpoints"


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint that is written after `step` optimiser steps."""
    return checkpoints_folder(run) / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    match = STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest step first; leftovers of interrupted saves are not among them."""
    return _steps_in(checkpoints_folder(run))


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint folder with the highest step, not yet opened; None if the run has none."""
    return next(reversed(list_checkpoints(run)), None)


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest in a checkpoints folder or a run folder.

    Raises:
        UsageError: there is no such folder, or it holds no checkpoint.
        CheckpointError: the folder is the leftover of an interrupted save.
    """
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {path}: there is no such folder; give a run folder or a checkpoint folder")
    name = path.resolve().name
    if LEFTOVER_NAME.fullmatch(name):
        raise CheckpointError(f"{path} is what an interrupted save left; give a folder named like step-00000100")
    if (path / MANIFEST).exists() or STEP_NAME.fullmatch(name):
        return path
    found = _steps_in(path) or list_checkpoints(path)
    if not found:
        raise UsageError(f"{path} holds no checkpoint; give a run folder or a checkpoint folder (step-00000100)")
    return found[-1]


def prune(run: Path, keep_last: int, best_step: int | None) -> list[Path]:
    """Remove all checkpoints but the last `keep_last` (at least 1) and that of `best_step`; returns those removed."""
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    return _remove([p for p in list_checkpoints(run)[:-keep_last] if step_of(p) != best_step])


def discard_after(run: Path, step: int) -> list[Path]:
    """Remove the checkpoints past `step`, for a run that goes on from an earlier one; returns those removed."""
    return _remove([p for p in list_checkpoints(run) if (step_of(p) or 0) > step])


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what interrupted saves and removals left in a checkpoints folder."""
    for path in checkpoints.iterdir():
        if LEFTOVER_NAME.fullmatch(path.name):
            shutil.rmtree(path)


def _steps_in(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    found = [(step, p) for p in checkpoints.iterdir() if p.is_dir() and (step := step_of(p)) is not None]
    return [path for _, path in sorted(found)]


def _remove(folders: list[Path]) -> list[Path]:
    for folder in folders:
        remove_folder(folder)
    return folders
