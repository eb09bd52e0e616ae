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
    latest_checkpoint,
    list_checkpoints,
    step_of,
)
from vlmoe_core.checkpoint.manifest import Manifest, check_folder, read_manifest
from vlmoe_core.checkpoint.shards import index_name
from vlmoe_core.checkpoint.state import RunState, read_state
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.errors import CheckpointError


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


def read_checkpoint(path: Path, verify: Literal["sizes", "sha256"] = "sizes") -> Checkpoint:
    """Open a checkpoint folder; `resolve` finds it from a run folder.

    Args:
        path: the checkpoint folder.
        verify: sizes: the list of files, their sizes and the headers; sha256: every byte as well (to resume).

    Raises:
        CheckpointError: names the file or key that is missing, foreign or altered, or a format that is newer.
    """
    manifest = read_manifest(path)
    check_folder(path, manifest, content=verify == "sha256")
    for name in (STATE, RECIPE):
        if name not in manifest.files:
            raise CheckpointError(f"{path / name} is missing")
    state = read_state(path / STATE)
    if step_of(path) not in (None, state.step):
        raise CheckpointError(f"{path} holds step {state.step}: the folder has been renamed; give it back its name")
    recipe_text = (path / RECIPE).read_text(encoding="utf-8")
    optimizer = StoredTensors(path, OPTIMIZER) if index_name(OPTIMIZER) in manifest.files else None
    return Checkpoint(path, manifest, state, recipe_text, StoredTensors(path, MODEL), optimizer)


def read_latest(run: Path) -> Checkpoint | None:
    """Open the newest checkpoint of a run and check every byte, to resume from it; None if the run has none.

    Raises:
        CheckpointError: the newest is damaged. It is never passed over silently; the message names the one before it.
    """
    newest = latest_checkpoint(run)
    if newest is None:
        return None
    try:
        return read_checkpoint(newest, verify="sha256")
    except CheckpointError as error:
        earlier = list_checkpoints(run)[:-1]
        way_out = f"from the one before: --resume {earlier[-1]}" if earlier else "from the start: --overwrite"
        raise CheckpointError(f"{error}; to go on {way_out}") from error
