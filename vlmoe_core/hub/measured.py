"""Where the results of a model lie, and what of them goes to the Hub."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmoe_core.checkpoint.layout import step_of
from vlmoe_core.data.naming import public_names
from vlmoe_core.hf import is_hub
from vlmoe_core.hub.contents import described
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.results import save_result
from vlmoe_core.train.scoring import Asked, split_of
from vlmoe_core.train.trained import Trained


@contextmanager
def home_of(model: Path, checkpoint: Path) -> Iterator[Path]:
    """The folder that keeps the results of a model: its run, or its model folder.

    Of a model on the Hub a folder that is gone afterwards: the cache is not written into.

    Args:
        model: as it was typed.
        checkpoint: the folder that it means.
    """
    if is_hub(str(model)):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield checkpoint.resolve().parent.parent if step_of(checkpoint) is not None else checkpoint


def keep(home: Path, trained: Trained, asked: Asked, report: Mapping[str, Any]) -> Path:
    """Keep a report among the results. Raises TrainError if the disk refuses."""
    assert trained.recipe.task is not None
    data = public_names(split_of(asked), (open_task(trained.recipe.task).stream,))
    return save_result(home, report, data, trained.step, asked.limit)


def result_files(home: Path, trained: Trained, repo: str) -> dict[str, Path | bytes]:
    """Results, `.eval_results` and a card that tells of them, by their paths in the repository."""
    return described(trained.path, home, repo)
