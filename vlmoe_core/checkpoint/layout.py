"""Where the checkpoints of a run lie: RUN/checkpoints/step-00000100/. A folder with such a name is whole."""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from vlmoe_core.checkpoint.files import PARTIAL, REMOVED, remove_folder
from vlmoe_core.hf import cached_spec

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


def name_of(model: Path) -> str:
    """What a model is called in what is published: run/checkpoints/step-00000100, its folder's own name, or its name on
    the Hub where it was fetched from there.
    """
    if (spec := cached_spec(model)) is not None:
        return spec
    parts = model.resolve().parts
    return "/".join(parts[-3:]) if step_of(model) is not None else parts[-1]


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest step first; leftovers of interrupted saves are not among them."""
    return steps_in(checkpoints_folder(run))


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint folder with the highest step, not yet opened; None if the run has none."""
    return next(reversed(list_checkpoints(run)), None)


def prune(run: Path, keep_last: int, best_step: int | None, held: Collection[Path] = ()) -> list[Path]:
    """Remove all checkpoints but the last `keep_last` (at least 1) and that of `best_step`.

    Args:
        run: the run folder.
        keep_last: so many newest ones stay.
        best_step: the checkpoint of this step stays.
        held: checkpoint folders that somebody still reads, such as a push to the Hub: they stay as well.

    Returns:
        The folders that were removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    kept = {path.resolve() for path in held}
    old = list_checkpoints(run)[:-keep_last]
    return _remove([path for path in old if step_of(path) != best_step and path.resolve() not in kept])


def discard_after(run: Path, step: int) -> list[Path]:
    """Remove the checkpoints past `step`, for a run that goes on from an earlier one; returns those removed."""
    return _remove([p for p in list_checkpoints(run) if (step_of(p) or 0) > step])


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what interrupted saves and removals left in a checkpoints folder."""
    for path in checkpoints.iterdir():
        if LEFTOVER_NAME.fullmatch(path.name):
            shutil.rmtree(path)


def steps_in(checkpoints: Path) -> list[Path]:
    """Checkpoint folders inside a folder, oldest step first."""
    if not checkpoints.is_dir():
        return []
    found = [(step, p) for p in checkpoints.iterdir() if p.is_dir() and (step := step_of(p)) is not None]
    return [path for _, path in sorted(found)]


def _remove(folders: list[Path]) -> list[Path]:
    for folder in folders:
        remove_folder(folder)
    return folders
