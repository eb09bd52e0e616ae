"""metrics.jsonl and a checkpoint: the file is on disk before its length is recorded, and is cut there on resume."""

import os
from pathlib import Path

from vlmoe_core.checkpoint.files import sync
from vlmoe_core.errors import CheckpointError


def metrics_offset(path: Path) -> int:
    """Bytes of a metrics file, all of them synced to disk: what a checkpoint records. 0 if there is none yet."""
    if not path.exists():
        return 0
    sync(path)
    return path.stat().st_size


def cut_metrics(path: Path, offset: int) -> None:
    """Drop the lines that were written after the checkpoint, so that a resumed run writes them again.

    Raises:
        CheckpointError: the file is shorter than that, or the cut would fall within a line.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < offset:
        raise CheckpointError(
            f"{path} has {size} bytes, the checkpoint was written after {offset}; put the whole file back"
        )
    if size == 0:
        return
    with path.open("r+b") as file:
        if offset:
            file.seek(offset - 1)
            if file.read(1) != b"\n":
                raise CheckpointError(
                    f"{path} is altered: no line ends at byte {offset}, where the checkpoint was written"
                )
        file.truncate(offset)
        os.fsync(file.fileno())
