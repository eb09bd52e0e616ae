from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def index_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Index caches of a test lie in a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VLMOE_CACHE", str(folder))
    return folder
