"""Writes a checkpoint: beside its place, synced, then renamed, so that a folder with its final name is whole."""

import platform
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from vlmoe_core.checkpoint.files import PARTIAL, put_in_place, sync, sync_tree
from vlmoe_core.checkpoint.layout import MODEL, OPTIMIZER, RECIPE, STATE, TOKENIZERS, remove_leftovers, step_folder
from vlmoe_core.checkpoint.manifest import write_manifest
from vlmoe_core.checkpoint.shards import MAX_SHARD_BYTES, write_tensors
from vlmoe_core.checkpoint.state import RunState, write_state
from vlmoe_core.errors import CheckpointError, UsageError

LIBRARIES = ("vlmoe", "torch", "accelerate", "safetensors", "tokenizers", "numpy")


def write_checkpoint(
    run: Path,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: RunState,
    recipe_text: str,
    tokenizers: Path | Callable[[Path], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the checkpoint of `state.step` into a run folder. Call it on the one rank that holds the tensors.

    Args:
        run: the run folder.
        model: the model's state, experts fused.
        optimizer: the optimiser's state by name, from `named_optimizer_state`.
        state: where the run stands.
        recipe_text: the merged recipe as YAML.
        tokenizers: a folder that is copied, or a function that writes the files into the folder it is given.
        max_shard_bytes: a shard is cut before it grows beyond this; so much memory is used on top of the tensors.

    Returns:
        The checkpoint folder. One that already had the name is replaced.

    Raises:
        CheckpointError: the disk refuses, or a tensor can't be stored. Earlier checkpoints stay as they are.
    """
    target = step_folder(run, state.step)
    parts = {MODEL: model, OPTIMIZER: optimizer}
    try:
        _prepare(target.parent)
        _write_folder(target, parts, state, recipe_text, tokenizers, max_shard_bytes)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}; earlier checkpoints are untouched") from error
    return target


def write_model(
    folder: Path,
    model: Mapping[str, Tensor],
    state: RunState,
    recipe_text: str,
    tokenizers: Path | Callable[[Path], None],
    optimizer: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    more: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a model folder: a checkpoint without a run around it, and as a rule without optimiser.

    Args as in `write_checkpoint`; `folder` must be new or empty. `more` writes further files into the folder that it is
    given; the manifest lists them too.

    Raises:
        UsageError: the folder holds files.
        CheckpointError: the disk refuses, or a tensor can't be stored; nothing is left then.
    """
    refuse_filled(folder)
    parts = {MODEL: model} if optimizer is None else {MODEL: model, OPTIMIZER: optimizer}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_folder(folder, parts, state, recipe_text, tokenizers, max_shard_bytes, more)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error
    return folder


def refuse_filled(folder: Path) -> None:
    """Raise UsageError for a folder that holds files already, or that has no name to be written beside."""
    if not folder.name:
        raise UsageError(f"--out {folder}: name a folder, which is made")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; choose another folder with --out")


def _write_folder(
    target: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: RunState,
    recipe_text: str,
    tokenizers: Path | Callable[[Path], None],
    max_shard_bytes: int,
    more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write beside the target, then rename. Whatever goes wrong leaves nothing behind."""
    partial = target.with_name(target.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        for stem, tensors in parts.items():
            write_tensors(partial, stem, tensors, max_shard_bytes)
        write_state(partial / STATE, state)
        (partial / RECIPE).write_text(recipe_text, encoding="utf-8")
        _write_tokenizers(partial / TOKENIZERS, tokenizers)
        more(partial)
        write_manifest(partial, int(time.time()), library_versions())
        sync_tree(partial)
        put_in_place(partial, target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter to a checkpoint; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _prepare(checkpoints: Path) -> None:
    if not checkpoints.is_dir():
        checkpoints.mkdir(parents=True)
        sync(checkpoints.parent)
    remove_leftovers(checkpoints)


def _write_tokenizers(folder: Path, tokenizers: Path | Callable[[Path], None]) -> None:
    if isinstance(tokenizers, Path):
        shutil.copytree(tokenizers, folder)
    else:
        folder.mkdir()
        tokenizers(folder)
