"""A model that was trained for two steps."""

from pathlib import Path

import pytest

from tests.train.support import tiny, train
from vlmoe_core.train.trained import Trained, load_trained


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return train(tiny(folder, "train.steps=2"), folder / "out").folder


@pytest.fixture(scope="session")
def trained(run_folder: Path) -> Trained:
    return load_trained(run_folder)
