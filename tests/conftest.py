"""What holds for every test: the same draws in any order, uninitialised memory shows itself, skips are printed."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import deterministic

from tests.hub.connect import connected
from tests.hub.fake_hub import FakeHub, running_hub
from tests.skips import EXPECTED_FILE, SkipReport, read_reasons


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipReport(read_reasons(EXPECTED_FILE.read_text("utf-8"))), "skips")


@pytest.fixture(autouse=True)
def _same_draws_in_any_order() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)  # type: ignore[operator]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty and the like give NaN (integers: the largest), so that a test fails that reads what nobody wrote."""
    fill, algorithms = deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(algorithms)
    deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on the loopback device; huggingface_hub talks to it, logged in, with its cache in a folder of the test."""
    with running_hub() as hub, connected(hub, tmp_path / "hf-home", monkeypatch):
        yield hub
