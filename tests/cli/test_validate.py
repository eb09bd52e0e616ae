"""`vlmoe validate`."""

import json
import time
from pathlib import Path

import pytest

from tests.train.tasks_support import PRETRAINING
from vlmoe_cli.main import main

RECIPE = """
model: {layers: 1, dim: 16, heads: 2, hidden: 16, vl_layers: 1, patch_size: 8, image_size: 16, max_text_length: 24}
tokenizers: {text: {vocab_size: 100}, visual: {codebook_size: 8}}
data:
  max_text: {text: 24, pair: 24}
  train: {pair: [{source: scenes, size: 20, image_size: 16}]}
objective: {name: masked}
batch: {size: {pair: 4}, micro: {pair: 2}}
train: {steps: 5}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLMOE_CACHE", str(tmp_path / "cache"))
    Path("my.yaml").write_text(RECIPE)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["validate", *arguments])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_a_line_for_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "my.yaml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "ok           recipe: my, 5 steps of 4 pair examples (micro-batches: 2)"
    assert "ok           data.train.pair: scenes size=20 image_size=16: 20 examples" in lines
    assert {line[:13] for line in lines} == {"ok           ", "not checked  "}


def test_one_document_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "my.yaml", "--no-data", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["recipe"] == "my" and document["data_read"] is False
    states = {check["name"]: check["state"] for check in document["checks"]}
    assert states["step"] == "ok" and states["data and tokenizers"] == "not checked"
    model = next(check for check in document["checks"] if check["name"] == "model")
    assert model["parameters"] == model["active_parameters"] > 1000


def test_a_rehearsal_of_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    experts = ("--set", "model.moe.vision={num_experts: 4, layers: [0]}", "--set", "parallel.expert=2")
    arguments = ("my.yaml", "--no-data", "--world", "2", "--set", "model.vl_layers=0", *experts)
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[3:7]] == [
        "ok           step", "ok           rank 0..1", "ok           step of rank 0", "ok           on the wire",
    ]  # fmt: skip
    assert "1 replica x 2 shares of experts, shard none" in lines[4] and "if tokens go to its experts" in lines[5]
    assert "of tokens to experts and back" in lines[6] and "by DistributedDataParallel" in lines[6]
    assert all(line.startswith("not checked") for line in lines[7:])
    document = json.loads(run(capsys, *arguments, "--json")[1])
    checks = {check["name"]: check for check in document["checks"]}
    ranks = checks["rank 0..1"]["ranks"]
    assert document["world"] == 2 and [one["rank"] for one in ranks] == [0, 1]
    assert checks["step of rank 0"]["peak"] < checks["step of rank 0"]["worst_peak"]
    assert checks["on the wire"]["even"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--world", "3"), "2 micro-batches a step (batch.size / batch.micro) can't be dealt to 3 processes"),
        (("--world", "2", "--set", "parallel.expert=2"), "the model has no sparse layer"),
    ],
)
def test_processes_that_do_not_fit(capsys: pytest.CaptureFixture[str], override: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, "my.yaml", *override)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_the_paper_on_32_gpus_is_rehearsed_within_two_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    code, out, err = run(capsys, "paper/base-32e", "--no-data", "--world", "32", "--set", "parallel.expert=32")
    assert (code, err) == (0, "") and time.monotonic() - started < 120
    assert "1 replica x 32 shares of experts" in out and "built with 205,520,186 parameters each" in out


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("model.heads=3", 2, "must divide dim (16)"),
        ("data.train.pair.0={source: jsonl, path: a.jsonl}", 1, "error: nothing matches 'a.jsonl'"),
        ("tokenizers.text.load=./a.json", 1, "error: text tokenizer ./a.json is not there"),
        ("tokenizers.visual.load=absent", 1, "absent holds no visual tokenizer"),
    ],
)
def test_what_is_wrong_is_one_message(
    capsys: pytest.CaptureFixture[str], override: str, code: int, message: str
) -> None:
    found, _, err = run(capsys, "my.yaml", "--set", override)
    assert found == code and message in err and len(err.splitlines()) == 1


def test_a_run_that_is_not_there_yet_is_stood_in_for_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "quickstart/nli", "--no-data")
    assert (code, err) == (0, "")
    assert "start: runs/quickstart-pretrain is not there; shipped recipes give its model: quickstart/pretrain\n" in out
    assert "ok           step: " in out
    code, _, err = run(capsys, "quickstart/nli")
    assert code == 2 and "init: no checkpoint at runs/quickstart-pretrain" in err and len(err.splitlines()) == 1


def test_the_model_to_start_from_is_an_option(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nli = str(work / "nli.yaml")
    code, out, err = run(capsys, nli, "--model", str(work / "runs" / "base"), "--no-data")
    assert (code, err) == (0, "") and "start:" not in out and "ok           step: " in out
    code, _, err = run(capsys, nli, "--model", "runs/nobody", "--no-data")
    assert code == 2 and "init: no checkpoint at runs/nobody" in err


def test_tokenizers_of_the_model_that_a_run_starts_from_are_not_fitted(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(work / "base.yaml")
    assert "the whole fit (text and visual)" in run(capsys, recipe)[1]
    code, out, err = run(capsys, recipe, "--set", f"init={work / 'runs' / 'base'}", "--set", PRETRAINING[0])
    assert code == 0 and "the whole fit" not in out, err
