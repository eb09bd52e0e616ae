"""`vlmoe env`."""

import json

import pytest
import torch

from vlmoe_cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["env", *arguments])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMOE_CACHE", "/some/cache")
    lines = run(capsys).splitlines()
    starts = [line.split()[0] for line in lines if line]
    assert starts[:7] == ["python", "platform", "cores", "torch", "devices", "cache", "recipes"]
    assert {"vlmoe", "accelerate", "tutel", "typer"} <= set(starts)
    assert any(line.startswith("torch ") and torch.__version__ in line for line in lines)
    assert any(line.split() == ["cache", "/some/cache"] for line in lines)


def test_tutel_comes_with_its_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmoe_core.environment._version", lambda name: None)
    out = run(capsys)
    assert "pip install --no-build-isolation git+https://github.com/microsoft/tutel@" in out
    assert any(line.split() == ["accelerate", "not", "installed"] for line in out.splitlines())


def test_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--json"))
    assert found["torch"]["version"] == torch.__version__ and found["torch"]["threads"] == torch.get_num_threads()
    assert found["devices"] == [] or torch.cuda.is_available() or torch.backends.mps.is_available()
    assert found["packages"]["typer"] and found["recipes"]
