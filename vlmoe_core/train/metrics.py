"""Metrics: one JSON object a line in metrics.jsonl, and the same numbers to the trackers."""

import json
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from vlmoe_core.errors import TrainError


class MetricsLog:
    """Writes the lines of a run; only rank 0 holds one."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator

    def write(self, record: Mapping[str, float | str]) -> None:
        """Append one line and tell the trackers."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise TrainError(f"{self.path} can't be written: {error.strerror}; --resume goes on when it can") from error
        split, step = str(record["split"]), int(record["step"])
        values = {f"{split}/{k}": v for k, v in record.items() if k not in ("step", "split", "time")}
        self.accelerator.log(values, step=step)


def read_metrics(path: Path, split: str | None = None) -> list[dict[str, float | str]]:
    """The lines of metrics.jsonl, of one split if given."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if split in (None, line["split"])]
