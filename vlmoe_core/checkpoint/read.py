"""Reads a checkpoint, after checking it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmoe_core.checkpoint.layout import (
    MODEL,
    OPTIMIZER,
    RECIPE,
    STATE,
    TOKENIZERS,
    step_of,
    steps_in,
)
from vlmoe_core.checkpoint.manifest import Manifest, check_folder, read_manifest
from vlmoe_core.checkpoint.shards import index_name
from vlmoe_core.checkpoint.state import RunState, read_state
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """The files of a checkpoint whose bytes one of several processes checks: together all, each file once."""

    rank: int = 0
    """Which process this is, from 0."""
    ranks: int = 1
    """How many there are."""

    def of(self, manifest: Manifest) -> list[str]:
        """This process's files: the largest first, each to the process that has fewest bytes so far."""
        bytes_of = [0] * self.ranks
        mine = []
        for name, record in sorted(manifest.files.items(), key=lambda file: (-file[1].size, file[0])):
            rank = bytes_of.index(min(bytes_of))
            bytes_of[rank] += record.size
            mine += [name] if rank == self.rank else []
        return mine


ALL = Part()
"""A process that checks everything."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    path: Path
    """Its folder."""
    manifest: Manifest
    """Its files, age and library versions."""
    state: RunState
    """Where the run stood."""
    recipe_text: str
    """The merged recipe as YAML."""
    model: StoredTensors
    """The model's tensors by name, experts fused; read on look-up."""
    optimizer: StoredTensors | None
    """The optimiser's tensors, `exp_avg.<parameter>` and so on; read on look-up. None: a model folder without them."""

    @property
    def tokenizers(self) -> Path:
        """Folder of the tokenizers' files."""
        return self.path / TOKENIZERS

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that wrote it."""
        return self.manifest.versions


def read_checkpoint(path: Path, verify: Literal["sizes", "sha256"] = "sizes", part: Part = ALL) -> Checkpoint:
    """Open a checkpoint folder; `resolve` finds it from a run folder.

    Args:
        path: the checkpoint folder.
        verify: sizes: the list of files, their sizes and the headers; sha256: every byte as well (to resume).
        part: with sha256, whose bytes; sizes and headers are always those of all files.

    Raises:
        CheckpointError: names the file or key that is missing, foreign or altered, or a format that is newer. Of
            several processes with a part each it may be one alone that raises.
    """
    manifest = read_manifest(path)
    check_folder(path, manifest, part.of(manifest) if verify == "sha256" else ())
    for name in (STATE, RECIPE):
        if name not in manifest.files:
            raise CheckpointError(f"{path / name} is missing")
    state = read_state(path / STATE)
    if step_of(path) not in (None, state.step):
        raise CheckpointError(f"{path} holds step {state.step}: the folder has been renamed; give it back its name")
    recipe_text = (path / RECIPE).read_text(encoding="utf-8")
    optimizer = StoredTensors(path, OPTIMIZER) if index_name(OPTIMIZER) in manifest.files else None
    return Checkpoint(path, manifest, state, recipe_text, StoredTensors(path, MODEL), optimizer)


def read_newest(newest: Path, part: Part = ALL) -> Checkpoint:
    """Open the checkpoint that `latest_checkpoint` found, to resume from it; this process checks a part of its bytes.

    Several processes call it with one folder, that which one of them found: a disk may show them different ones.

    Raises:
        CheckpointError: it is damaged. It is never passed over silently; the message names the one before it.
    """
    try:
        return read_checkpoint(newest, verify="sha256", part=part)
    except CheckpointError as error:
        earlier = [folder for folder in steps_in(newest.parent) if (step_of(folder) or 0) < (step_of(newest) or 0)]
        way_out = f"from the one before: --resume {earlier[-1]}" if earlier else "from the start: --overwrite"
        raise CheckpointError(f"{error}; to go on {way_out}") from error
