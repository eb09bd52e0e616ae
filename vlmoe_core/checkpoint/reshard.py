"""A checkpoint cut anew: the same tensors, bit for bit, in the files that another number of processes would write."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmoe_core.checkpoint.files import PARTIAL, put_in_place, sync_tree
from vlmoe_core.checkpoint.layout import LEFTOVER_NAME, MODEL, OPTIMIZER, step_of
from vlmoe_core.checkpoint.manifest import write_manifest
from vlmoe_core.checkpoint.names import group_experts
from vlmoe_core.checkpoint.offers import Offer, Offers
from vlmoe_core.checkpoint.owners import make_plan
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.checkpoint.shards import MAX_SHARD_BYTES, index_name, write_index
from vlmoe_core.checkpoint.spans import Span, same, spans_in, write_spans
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.checkpoint.write import library_versions
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.moe.share import Share


@dataclass(frozen=True)
class Cut:
    """The processes whose files are written."""

    world: int = 1
    """How many there are."""
    expert: int = 1
    """How many of them share the experts of each layer."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """A file is cut before it grows beyond this."""


@dataclass(frozen=True)
class Resharded:
    """What was written, and compared with its source."""

    step: int
    """Optimiser steps that were done."""
    files: int
    """Files of tensors."""
    tensors: int
    """Keys in them; each is the same bit for bit."""
    bytes: int
    """Of all tensors."""


def reshard(source: Path, out: Path, cut: Cut) -> Resharded:
    """Copy a checkpoint or model folder, its tensors in other files; what else its manifest lists as it is.

    Tensors are moved as bytes, a few at a time. The copy is read back and compared before it gets its name.

    Args:
        source: the folder, every byte of which is checked first.
        out: a folder that is new or empty.
        cut: whose files.

    Raises:
        UsageError: `out` is no place for it, or the cut does not fit the experts.
        CheckpointError: the source is damaged, or the disk refuses; nothing is left then.
    """
    _refuse_place(source, out)
    checkpoint = read_checkpoint(source, verify="sha256")
    if step_of(out) not in (None, checkpoint.state.step):
        raise UsageError(f"{out} is named after step {step_of(out)}, but {source} holds step {checkpoint.state.step}")
    _refuse_cut(checkpoint, cut)
    partial = out.with_name(out.name + PARTIAL)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        written = _write(checkpoint, partial, cut)
        put_in_place(partial, out)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}; {source} is as it was") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


def _refuse_place(source: Path, out: Path) -> None:
    """Raises UsageError for a folder that holds files, lies in the source, is a link, or has a name that is none."""
    if not out.name or LEFTOVER_NAME.fullmatch(out.name):
        raise UsageError(f"{out} can't be the folder of a checkpoint; give it another name")
    if out.is_symlink():
        raise UsageError(f"{out} is a link, and a folder would take its place; name the folder itself")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not empty; choose another folder")
    if source.resolve() in out.resolve().parents:
        raise UsageError(f"{out} lies inside the checkpoint that is read; choose another folder")


def _refuse_cut(checkpoint: Checkpoint, cut: Cut) -> None:
    """Raises UsageError where the experts can't be shared so."""
    experts = sorted(set(checkpoint.model.experts().values()))
    if cut.expert > 1 and not experts:
        raise UsageError(f"--expert {cut.expert}: the model has no experts to share; leave the option out")
    fits = [n for n in range(1, cut.world + 1) if all(number % n == 0 for number in (cut.world, *experts))]
    if cut.expert not in fits:
        raise UsageError(
            f"--expert {cut.expert} must divide --world {cut.world} and the experts of each layer "
            f"({', '.join(map(str, experts))}); these sizes fit: {', '.join(map(str, fits))}"
        )


def _write(checkpoint: Checkpoint, folder: Path, cut: Cut) -> Resharded:
    """Write a folder, and compare what stands in it with the source."""
    parts = {MODEL: checkpoint.model, OPTIMIZER: checkpoint.optimizer}
    stored = {stem: tensors for stem, tensors in parts.items() if tensors is not None}
    folder.mkdir()
    shards: set[str] = set()
    for stem, tensors in stored.items():
        shards |= {index_name(stem), *tensors.shards}
        _write_part(tensors, checkpoint.path, stem, folder, cut)
    for name in sorted(checkpoint.manifest.files.keys() - shards):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / name, folder / name)
    write_manifest(folder, int(time.time()), library_versions())
    sync_tree(folder)
    _compare(checkpoint, read_checkpoint(folder, verify="sizes"))
    spans = [span for tensors in stored.values() for span in _spans(checkpoint.path, tensors).values()]
    files = list(folder.glob("*.safetensors"))
    return Resharded(checkpoint.state.step, len(files), len(spans), sum(span.nbytes for span in spans))


def _write_part(tensors: StoredTensors, source: Path, stem: str, folder: Path, cut: Cut) -> None:
    shares = [_offers(tensors, cut.expert, number) for number in range(cut.expert)]
    plan = make_plan(stem, [shares[rank % cut.expert] for rank in range(cut.world)], cut.max_shard_bytes)
    spans = _spans(source, tensors)
    for files in plan.files:
        for name, keys in files.items():
            write_spans(folder / name, {key: spans[key] for key in keys})
    write_index(folder, plan)


def _offers(tensors: StoredTensors, degree: int, number: int) -> Offers:
    """What a process would hold of the tensors: all, and of the experts the share of that number, of so many."""
    offered: dict[str, Offer] = {}
    for name, keys in group_experts([*tensors.infos, *tensors.tied]).items():
        nbytes = tensors.infos[tensors.tied.get(keys[0], keys[0])].nbytes
        count = len(keys) // degree
        share = None if keys == (name,) else Share(number * count, count, len(keys))
        offered[name] = Offer(share, nbytes)
    return Offers(offered, tensors.tied, tensors.quantised or None)


def _spans(folder: Path, tensors: StoredTensors) -> dict[str, Span]:
    return {key: span for name in sorted(tensors.shards) for key, span in spans_in(folder / name).items()}


def _compare(source: Checkpoint, copy: Checkpoint) -> None:
    """Raises CheckpointError where the copy is not the source."""
    for before, after in ((source.model, copy.model), (source.optimizer, copy.optimizer)):
        if before is None or after is None:
            differs = None if before is after else "optimiser"
        else:
            differs = _difference(_spans(source.path, before), _spans(copy.path, after))
            if (before.tied, before.quantised) != (after.tied, after.quantised):
                differs = "index"
        if differs is not None:
            raise CheckpointError(f"'{differs}' was written, but is read back otherwise: the disk can't be trusted")


def _difference(before: Mapping[str, Span], after: Mapping[str, Span]) -> str | None:
    """The first tensor that is not the same; null: all are."""
    lost = sorted(before.keys() ^ after.keys())
    return next((key for key in lost or before if lost or not same(before[key], after[key])), None)
