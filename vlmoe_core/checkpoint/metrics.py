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


def check_metrics(path: Path, offset: int) -> None:
    """Refuse a metrics file that is not the one a checkpoint recorded.

    Raises:
        CheckpointError: the file is shorter than that, or a cut would fall within a line.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < offset:
        raise CheckpointError(
            f"{path} has {size} bytes, the checkpoint was written after {offset}; put the whole file back"
        )
    if offset and not _ends_line(path, offset):
        raise CheckpointError(f"{path} is altered: no line ends at byte {offset}, where the checkpoint was written")


def cut_metrics(path: Path, offset: int) -> None:
    """Drop the lines that were written after the checkpoint, so that a resumed run writes them again.

    Errors as `check_metrics`.
    """
    check_metrics(path, offset)
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(offset)
        os.fsync(file.fileno())


def _ends_line(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset - 1)
        return file.read(1) == b"\n"
