"""A folder as a user has it after finetuning."""

from pathlib import Path

import pytest

from tests.cli.tasks_support import work_folder


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, a pretrained run and a run of each task; tests write into it nothing but new runs elsewhere."""
    return work_folder(tmp_path_factory.mktemp("work"))
