"""Leads huggingface_hub to the fake Hub, within this process and in those that it starts.

huggingface_hub reads its environment when it is imported, so that variables alone come too late for this process: the
constants that it made of them are replaced too. tests/test_hf.py tests the variables themselves, in fresh processes.
"""

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import TOKEN


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """The variables of a user of this Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def constants(hub: FakeHub, home: Path) -> dict[str, object]:
    """What huggingface_hub.constants would hold, had it been imported with that environment."""
    return {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }


@contextmanager
def connected(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While the block runs huggingface_hub knows no other Hub, no other folder and no pause between attempts."""
    from huggingface_hub import constants as module
    from huggingface_hub import hf_api
    from huggingface_hub.utils import close_session

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(hub, home).items():
        monkeypatch.setenv(name, value)
    for name, value in constants(hub, home).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for name in ("utils._http", "file_download"):
        monkeypatch.setattr(importlib.import_module(f"huggingface_hub.{name}"), "time", impatient)
    close_session()
    yield
    close_session()
