"""Writes a checkpoint: beside its place, synced, then renamed, so that a folder with its final name is whole.

`write_checkpoint` and `write_model` do it at once, in the one process that holds the tensors. Several processes call
`open_checkpoint` in one of them, `write_files` each, and at last `finish_checkpoint` in that one again.
"""

import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from vlmoe_core.checkpoint.files import PARTIAL, put_in_place, sync, sync_tree
from vlmoe_core.checkpoint.layout import MODEL, OPTIMIZER, RECIPE, STATE, TOKENIZERS, remove_leftovers, step_folder
from vlmoe_core.checkpoint.manifest import FileRecord, write_manifest
from vlmoe_core.checkpoint.owners import Plan
from vlmoe_core.checkpoint.shards import MAX_SHARD_BYTES, write_index, write_tensors
from vlmoe_core.checkpoint.state import RunState, write_state
from vlmoe_core.errors import CheckpointError, UsageError

LIBRARIES = ("vlmoe", "torch", "accelerate", "safetensors", "tokenizers", "numpy")
UNTOUCHED = "; earlier checkpoints are untouched"


@dataclass(frozen=True)
class Companions:
    """What a checkpoint holds beside the tensors."""

    state: RunState
    """Where the run stands."""
    recipe_text: str
    """The merged recipe as YAML."""
    tokenizers: Path | Callable[[Path], None]
    """A folder that is copied, or a function that writes the files into the folder it is given."""
    more: Callable[[Path], None] = lambda folder: None
    """Writes further files into the folder that it is given."""

    def write(self, folder: Path) -> None:
        """Write all of it into a folder."""
        write_state(folder / STATE, self.state)
        (folder / RECIPE).write_text(self.recipe_text, encoding="utf-8")
        if isinstance(self.tokenizers, Path):
            shutil.copytree(self.tokenizers, folder / TOKENIZERS)
        else:
            (folder / TOKENIZERS).mkdir()
            self.tokenizers(folder / TOKENIZERS)
        self.more(folder)


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
    companions = Companions(state, recipe_text, tokenizers)
    partial = open_checkpoint(target)
    with telling(target, UNTOUCHED):
        _write_folder(partial, target, {MODEL: model, OPTIMIZER: optimizer}, companions, max_shard_bytes)
    return target


def open_checkpoint(target: Path) -> Path:
    """Make the folder, beside its place, into which a checkpoint of a run is written; remove what others left there.

    Raises:
        CheckpointError: the disk refuses.
    """
    with telling(target, UNTOUCHED):
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            sync(target.parent.parent)
        remove_leftovers(target.parent)
        return _open(target)


def finish_checkpoint(
    partial: Path, target: Path, plans: Iterable[Plan], companions: Companions, records: Mapping[str, FileRecord]
) -> None:
    """Write all that is no tensor beside the shards of all processes, then give the folder its name.

    Args:
        partial: from `open_checkpoint`.
        target: the checkpoint folder. One that already has the name is replaced.
        plans: of model and optimiser.
        companions: what is written.
        records: what the shards of all processes are.

    Raises:
        OSError: the disk refuses.
        CheckpointError: a shard of another process is not here, or the state can't be stored.
    """
    for plan in plans:
        write_index(partial, plan)
    companions.write(partial)
    write_manifest(partial, int(time.time()), library_versions(), records)
    sync_tree(partial)
    put_in_place(partial, target)


@contextmanager
def telling(target: Path, left: str = "") -> Iterator[None]:
    """Turn what the disk says inside into a CheckpointError about a folder; `left`: what else there is to say."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}{left}") from error


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
    with telling(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        companions = Companions(state, recipe_text, tokenizers, more)
        _write_folder(_open(folder), folder, parts, companions, max_shard_bytes)
    return folder


def refuse_filled(folder: Path) -> None:
    """Raise UsageError for a folder that holds files already, or that has no name to be written beside."""
    if not folder.name:
        raise UsageError(f"--out {folder}: name a folder, which is made")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; choose another folder with --out")


def _open(target: Path) -> Path:
    partial = target.with_name(target.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def _write_folder(
    partial: Path,
    target: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    companions: Companions,
    max_shard_bytes: int,
) -> None:
    """Write into the folder beside the target, then rename. Whatever goes wrong leaves nothing behind."""
    try:
        records: dict[str, FileRecord] = {}
        for stem, tensors in parts.items():
            records |= write_tensors(partial, stem, tensors, max_shard_bytes)
        finish_checkpoint(partial, target, (), companions, records)
    except (OSError, CheckpointError):
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
