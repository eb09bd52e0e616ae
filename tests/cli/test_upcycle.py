import json
from pathlib import Path

import pytest

from tests.train.support import fresh_process, tiny, train
from vlmoe_cli import upcycle as verb
from vlmoe_cli.errors import guarded
from vlmoe_cli.options import group


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    overrides = ("model.moe.vision=null", "model.moe.text=null", "train.steps=2")
    train(tiny(folder, *overrides), folder / "run")
    fresh_process()
    return folder / "run"


def vlmoe(*arguments: object) -> int:
    """The exit code of `vlmoe upcycle ARGUMENTS`."""
    app = group()
    app.command()(verb.upcycle)
    with pytest.raises(SystemExit) as end:
        guarded(lambda: app([str(argument) for argument in arguments], prog_name="vlmoe upcycle"))
    return int(end.value.code or 0)


def test_prints_the_receipt(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sparse"
    assert vlmoe(dense, "--experts", 4, "--layers", "every:1", "--out", out) == 0
    printed = capsys.readouterr()
    assert "largest difference of states" in printed.out and "4, k = 1, weights unit, capacity 1.25" in printed.out
    assert f"receipt: {out / 'upcycle.json'}" in printed.out and "moments copied" in printed.out
    assert len([line for line in printed.out.splitlines() if line.split()[1:2] in (["vision"], ["text"])]) == 4
    assert "warning" not in printed.err
    assert (out / "model.safetensors.index.json").exists()


def test_json_is_the_receipt_of_the_folder(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sparse"
    options = ("--experts", 2, "--layers", 1, "--modality", "text", "--top-k", 2, "--capacity-factor", "none")
    assert vlmoe(dense, *options, "--noise", 0.1, "--seed", 3, "--out", out, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == json.loads((out / "upcycle.json").read_text())
    assert (found["experts"], found["top_k"], found["weights"], found["capacity_factor"]) == (
        2,
        2,
        "renormalised",
        None,
    )
    assert (found["layers"], found["noise"], found["seed"]) == ({"text": [1]}, 0.1, 3)
    assert found["difference"]["states"] > 1e-4 and "the function changes" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "odd"), "--layers odd: give every:N"),
        (("--modality", "sound"), "--modality sound: give vision"),
        (("--capacity-factor", "-1"), "--capacity-factor -1: give a factor above 0"),
        (("--weights", "mean"), "--weights mean: give unit, renormalised or gate"),
        (("--weights", "renormalised"), "gives the router no gradient"),
        (("--experts", "2", "--top-k", "3"), "top_k (3) is more than num_experts (2)"),
    ],
)
def test_what_was_mistyped_ends_with_2(
    dense: Path, tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vlmoe(dense, "--layers", "1", *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sparse_model_is_refused_by_name(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlmoe(dense, "--experts", 2, "--layers", 1, "--out", tmp_path / "first") == 0
    assert vlmoe(tmp_path / "first", "--experts", 2, "--layers", 1, "--out", tmp_path / "second") == 2
    assert "sparse already: vision has 2 experts in blocks 1" in capsys.readouterr().err
