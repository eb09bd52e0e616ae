import json
from pathlib import Path

import pytest
import torch

from vlmoe_cli import checkpoint as verb
from vlmoe_cli.errors import guarded
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = {"blocks.1.ffn.vision.experts.up.weight": torch.ones(4, 2, 3), "embed.weight": torch.ones(5, 3)}
    folder = tmp_path / "runs" / "toy"
    for step in (10, 20):
        write_checkpoint(folder, model, {}, RunState(step=step, positions={"pair": step}), "seed: 0\n", lambda f: None)
    return folder


def vlmoe(*arguments: object) -> int:
    """The exit code of `vlmoe checkpoint ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        guarded(lambda: verb.app([str(argument) for argument in arguments], prog_name="vlmoe checkpoint"))
    return int(end.value.code or 0)


def shard(run: Path, step: int) -> Path:
    return next((run / "checkpoints" / f"step-{step:08d}").glob("model-*.safetensors"))


def test_inspect_shows_the_newest_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("inspect", run) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["step"].endswith("20") and lines["recipe"].endswith("toy") and lines["parameters"].endswith("39")
    assert lines["blocks.1.ffn.vision"].split()[-1] == "4"
    assert lines["model"].split()[1:] == ["F32", "5", "39", "156"]
    assert "seconds" in lines["age"]


def test_inspect_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("inspect", run / "checkpoints" / "step-00000010", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["format"], found["experts"]) == (10, 1, {"blocks.1.ffn.vision": 4})
    assert found["groups"] == [{"part": "model", "dtype": "F32", "tensors": 5, "values": 39, "bytes": 156}]


def test_verify_says_ok_for_each_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("verify", run) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("step-00000020")
    assert sum(line.endswith("  ok") for line in out.splitlines()) == 5


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_verify_names_what_is_broken(run: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    path = shard(run, 20)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert vlmoe("verify", run, *flags) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "damaged in 1 of 5" in printed.err and path.name in printed.err
    assert "Traceback" not in printed.err
    if flags:
        found = json.loads(printed.out)
        assert not found["ok"] and [f["name"] for f in found["files"] if f["problem"]] == [path.name]
    else:
        assert any(line.startswith(path.name) and "SHA-256" in line for line in printed.out.splitlines())
    assert vlmoe("verify", run / "checkpoints" / "step-00000010") == 0


def test_nothing_there_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("inspect", tmp_path / "nowhere") == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert vlmoe("verify", tmp_path) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_reshard_writes_a_copy_that_is_verified(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("reshard", run, tmp_path / "moved", "--world", 4, "--expert", 2) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["from"].endswith("step-00000020") and lines["step"].endswith("20")
    assert lines["processes"].endswith("4, of which 2 share the experts")
    assert lines["read"].endswith("5 tensors, the same bit by bit")
    assert vlmoe("verify", tmp_path / "moved") == 0
    assert len(list((tmp_path / "moved").glob("model-*.safetensors"))) == 4


def test_reshard_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("reshard", run, tmp_path / "moved", "--max-shard-size", "60", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["step"], found["tensors"], found["bytes"]) == (str(tmp_path / "moved"), 20, 5, 156)
    assert found["files"] == len(list((tmp_path / "moved").glob("*.safetensors"))) == 3
    assert found["source"] == str(run / "checkpoints" / "step-00000020")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--world", "4", "--expert", "3"), "--expert 3 must divide --world 4"),
        (("--expert", "2"), "these sizes fit: 1"),
        (("--max-shard-size", "much"), "--max-shard-size much: give a size such as 500MB"),
        (("--world", "0"), "--world"),
    ],
)
def test_reshard_refuses_options(
    run: Path, tmp_path: Path, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vlmoe("reshard", run, tmp_path / "moved", *options) == 2
    printed = capsys.readouterr()
    assert words in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "moved").exists()


def test_reshard_refuses_places(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe("reshard", tmp_path / "nowhere", tmp_path / "moved") == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert vlmoe("reshard", run, run) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    path = shard(run, 20)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert vlmoe("reshard", run, tmp_path / "moved") == 1
    assert path.name in capsys.readouterr().err and not (tmp_path / "moved").exists()
