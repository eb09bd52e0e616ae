"""What a checkpoint holds, and whether its files are those that were written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmoe_core.checkpoint.layout import MANIFEST, MODEL, OPTIMIZER, checkpoints_folder
from vlmoe_core.checkpoint.manifest import FORMAT, foreign_files, problem_of, read_manifest
from vlmoe_core.checkpoint.names import layer_of
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.errors import CheckpointError


@dataclass(frozen=True)
class TensorGroup:
    """All tensors of one type in one part of a checkpoint, counted as they stand on disk."""

    part: str
    """model or optim."""
    dtype: str
    """As safetensors writes it: F32, BF16."""
    tensors: int
    """Keys."""
    values: int
    """Numbers in them."""
    bytes: int
    """Bytes of them."""


@dataclass(frozen=True)
class Summary:
    """A checkpoint in a few numbers."""

    path: str
    """Its folder."""
    format: int
    """Version of the layout."""
    step: int
    """Optimiser steps that were done."""
    recipe: str
    """Name of the recipe."""
    created: int
    """Seconds since 1970."""
    bytes: int
    """Of all files."""
    parameters: int
    """Values in the model, persistent buffers included, tied ones once, no scales of int8."""
    groups: tuple[TensorGroup, ...]
    """Tensors by part and type."""
    experts: Mapping[str, int]
    """E of each sparse layer."""
    positions: Mapping[str, int]
    """The next position of each stream."""
    best_score: float | None
    """Best held-out score."""
    versions: Mapping[str, str]
    """Libraries that wrote it."""


@dataclass(frozen=True)
class FileReport:
    """The state of one file, or of the whole when every file by itself is right."""

    name: str
    """Path in the checkpoint folder."""
    problem: str | None
    """What is wrong; None: it is as it was written."""


def inspect_checkpoint(path: Path) -> Summary:
    """Summarise a checkpoint folder from its small files and headers; no tensor is read.

    Raises:
        CheckpointError: as `read_checkpoint` with `verify="sizes"`.
    """
    checkpoint = read_checkpoint(path, verify="sizes")
    state, manifest = checkpoint.state, checkpoint.manifest
    return Summary(
        path=str(path),
        format=FORMAT,
        step=state.step,
        recipe=state.recipe or _run_name(path),
        created=manifest.created,
        bytes=sum(record.size for record in manifest.files.values()) + (path / MANIFEST).stat().st_size,
        parameters=checkpoint.model.num_values,
        groups=tuple(group for part, tensors in _parts(checkpoint) for group in _groups(part, tensors)),
        experts={layer_of(name) or "": count for name, count in checkpoint.model.experts().items()},
        positions=state.positions,
        best_score=state.best_score,
        versions=manifest.versions,
    )


def verify_checkpoint(path: Path) -> list[FileReport]:
    """Compare every byte with the manifest, and the index with the shards. Goes on after a failure, to report them all.

    Raises:
        CheckpointError: the manifest is missing, altered or of a newer format.
    """
    manifest = read_manifest(path)
    files = manifest.files.items()
    reports = [FileReport(name, problem_of(path / name, record, content=True)) for name, record in files]
    reports += [FileReport(name, "does not belong to this checkpoint") for name in foreign_files(path, manifest)]
    if any(report.problem for report in reports):
        return reports
    try:
        read_checkpoint(path, verify="sizes")
    except CheckpointError as error:
        reports.append(FileReport(MANIFEST, str(error)))
    return reports


def _parts(checkpoint: Checkpoint) -> list[tuple[str, StoredTensors]]:
    parts = [(MODEL, checkpoint.model), (OPTIMIZER, checkpoint.optimizer)]
    return [(part, tensors) for part, tensors in parts if tensors is not None]


def _groups(part: str, tensors: StoredTensors) -> list[TensorGroup]:
    infos = list(tensors.infos.values())
    groups = []
    for dtype in sorted({info.dtype for info in infos}):
        of_type = [info for info in infos if info.dtype == dtype]
        values, size = sum(info.numel for info in of_type), sum(info.nbytes for info in of_type)
        groups.append(TensorGroup(part, dtype, len(of_type), values, size))
    return groups


def _run_name(path: Path) -> str:
    run = path.resolve().parent.parent
    return run.name if checkpoints_folder(run) == path.resolve().parent else ""
