from pathlib import Path

import pytest

from tests.train.support import fresh_process, tiny, train


@pytest.fixture(autouse=True)
def alone() -> None:
    fresh_process()


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny recipe, never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    train(tiny(folder), folder / "run")
    return folder / "run"
