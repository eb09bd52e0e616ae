"""A tokenizer that was trained for two steps."""

from pathlib import Path

import pytest

from tests.analysis.codes.support import tokenizer_run


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its run folder; tests write nothing into it but its report."""
    return tokenizer_run(tmp_path_factory.mktemp("tokens"))
