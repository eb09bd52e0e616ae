"""From a checkpoint of a run to a model folder that can leave the machine, no byte of a tensor written anew."""

import os
import shutil
from pathlib import Path

from vlmoe_core.checkpoint.files import PARTIAL, put_in_place, sync_tree
from vlmoe_core.checkpoint.layout import OPTIMIZER
from vlmoe_core.checkpoint.manifest import Manifest, write_records
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.write import refuse_filled
from vlmoe_core.errors import CheckpointError


def publish_model(checkpoint: Path, folder: Path, with_optimizer: bool = False) -> Path:
    """Make the model folder of a checkpoint: its files without the optimiser's, tensors linked where the disk allows.

    The same checkpoint always gives the same bytes, the manifest's included.

    Args:
        checkpoint: a checkpoint folder or a model folder; every byte of it is checked.
        folder: new or empty.
        with_optimizer: take the optimiser's state along, so that training can go on from it.

    Raises:
        CheckpointError: the checkpoint is not whole, or the disk refuses.
        UsageError: the folder holds files.
    """
    refuse_filled(folder)
    manifest = read_checkpoint(checkpoint, verify="sha256").manifest
    files = {name: record for name, record in manifest.files.items() if with_optimizer or not _of_optimizer(name)}
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in files:
            _link(checkpoint / name, partial / name)
        write_records(partial, Manifest(manifest.created, manifest.versions, files))
        sync_tree(partial)
        put_in_place(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder} could not be written: {error}") from error
    return folder


def _of_optimizer(name: str) -> bool:
    return name.startswith((f"{OPTIMIZER}-", f"{OPTIMIZER}."))


def _link(source: Path, target: Path) -> None:
    """Only what nobody edits is linked: an editor may write through a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target.suffix == ".safetensors":
            return os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        pass
    shutil.copyfile(source, target)
