"""Where the results of a model lie, and what of them goes to the Hub."""

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmoe_core.checkpoint.layout import step_of
from vlmoe_core.data.naming import public_names
from vlmoe_core.errors import UsageError
from vlmoe_core.hf import is_hub
from vlmoe_core.hub.card.folder import REPORT
from vlmoe_core.hub.contents import described, report_files, same_weights
from vlmoe_core.hub.push import PushRequest
from vlmoe_core.hub.there import TOLD, published
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


def place_for(trained: Trained, push: PushRequest) -> Path:
    """What the repository tells of a model so far. What is measured of other weights does not belong there.

    Raises:
        UsageError: the repository does not hold the weights of this model.
        HubError: the Hub can't be asked.
    """
    there = published(push.repo, push.revision, TOLD)
    if there is None or not same_weights(there, trained.path):
        raise UsageError(
            f"{push.repo} does not hold the weights of {trained.name}, so what is measured of them does not belong "
            f"there; first: {shlex.join(['vlmoe', 'push', trained.name, *push.words])}"
        )
    return there


def result_files(home: Path, trained: Trained, push: PushRequest) -> dict[str, Path | bytes]:
    """Results, `.eval_results` and a card that tells of them, by their paths in the repository.

    Errors as `place_for`.
    """
    return described(trained.path, home, push.repo, there=place_for(trained, push))


def routing_files(report: Path, trained: Trained, push: PushRequest, with_images: bool) -> dict[str, Path | bytes]:
    """A report of `vlmoe route-stats` and a card that shows it, likewise; `with_images` as in `report_files`."""
    there = place_for(trained, push)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / REPORT).symlink_to(report.resolve())
        card = described(trained.path, Path(folder), push.repo, there=there)
    return report_files(report, with_images) | card
