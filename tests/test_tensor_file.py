import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vlmoe_core.tensor_file import write_tensor_file


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_mode_is_that_of_any_new_file(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a.safetensors"
    for value in (1.0, 2.0):
        write_tensor_file(path, {"x": torch.full((3,), value)}, {"format": "pt"})
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"} and bool((file.get_tensor("x") == value).all())
    assert list(tmp_path.iterdir()) == [path]
