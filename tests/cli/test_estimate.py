"""`vlmoe estimate`."""

import json
from pathlib import Path

import pytest

from vlmoe_cli.main import main
from vlmoe_cli.units import BYTES, COUNTS, OPERATIONS, column, one

RECIPE = """
model:
  {layers: 2, dim: 16, heads: 2, hidden: 32, vl_layers: 0, patch_size: 8, image_size: 16, max_text_length: 24,
   moe: {text: {num_experts: 2}}}
tokenizers: {text: {load: absent, vocab_size: 100}, visual: {load: absent, codebook_size: 8}}
data:
  root: absent
  max_text: {text: 24, pair: 24}
  train: {pair: [{source: tar, path: "absent-*.tar"}]}
objective: {name: masked}
batch: {size: {pair: 4}, micro: {pair: 2}}
train: {steps: 5}
"""
FINETUNING = """
model: {image_size: 32}
data: {max_text: {pair: 20}, train: {pair: [{source: tar, path: "absent-*.tar"}]}}
task: {name: nlvr2}
init: runs/quickstart-pretrain
batch: {size: {pair: 4}, micro: {pair: 4}}
train: {steps: 5}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(RECIPE)
    Path("later.yaml").write_text(FINETUNING)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["estimate", *arguments])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "my.yaml", "--world", "2", "--tflops", "1")
    assert (code, err) == (0, "")
    assert out.startswith("parameters (exact)\n")
    titles = [line for line in out.splitlines() if line and out.split(line)[0].endswith("\n\n")]
    assert [title.split(" (")[0] for title in titles] == [
        "operations of one example in training",
        "tokens of an expert in one micro-batch",
        "2 devices: 2 replicas, shard none",
        "memory of one GPU of 2",
        "sent by one device in a step",
        "the whole run",
        "not counted",
        "taken to be so",
    ]
    assert "checkpointing off *  checkpointing on" in out
    assert "on 2 devices of 1 sustained TFLOP/s (modelled)" in out
    assert max(map(len, out.splitlines())) <= 115
    operations = out.split("\n\n")[1].splitlines()
    assert operations[1].split() == ["pair"]
    numbers = [float(line.split()[-2].replace(",", "")) for line in operations[2:] if "FLOP" in line]
    assert numbers[1] < numbers[0] < numbers[2] < numbers[-1]
    kept = next(line for line in out.splitlines() if line.startswith("kept by the encoder")).split()
    assert kept[-3:] == [kept[-3], "KiB", "counted"] and float(kept[-5]) > float(kept[-3])
    assert [line.split("  ")[0] for line in operations[2:]] == [
        "forward", "heads, part of it", "backward", "recomputed", "in all",
    ]  # fmt: skip


def test_devices_that_share_experts(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ("--set", "parallel={expert: 2, shard: full}")
    code, out, err = run(capsys, "my.yaml", "--world", "2", *shared)
    assert (code, err) == (0, "")
    assert "\n2 devices: 1 replica x 2 shares of experts, shard full (exact)\n" in out
    for line in ("the most", "the least", "tokens to experts and back", "weights gathered by fully_shard", "in all"):
        assert f"\n{line}  " in out
    assert "all experts get the same; at worst tokens choose experts of one device" in out
    assert "\nPEAK, tokens go to its experts alone  " in out and "\nkept by fully_shard: gathered weights  " in out
    assert max(map(len, out.splitlines())) <= 115
    code, out, err = run(capsys, "my.yaml", "--json", "--world", "2", *shared)
    memory, found = json.loads(out)["memory"], json.loads(out)["world"]
    assert (found["size"], found["expert"], found["replicas"], found["shard"]) == (2, 2, 1, "full")
    assert found["wire"]["even"] == sum(kind["even"] for kind in found["wire"]["kinds"])
    assert found["peak"]["even"] < found["peak"]["one_sided"]
    assert found["peak"]["even"] == memory["peak"]
    assert found["peak"]["one_sided"] == memory["plain"]["worst_peak"]
    assert 0 < memory["plain"]["gathered"] < memory["peak"]
    assert found["ranks"]["most"]["parameters"] > found["ranks"]["least"]["parameters"]
    assert "the recipe shares it" in run(capsys, "my.yaml", *shared)[1]


def test_one_document_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "my.yaml", "--json", "--set", "train.activation_checkpointing=true", "--on", "cpu")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["recipe"] == "my" and document["start"] is None
    assert document["params"]["total"] > document["params"]["active"] > 1000
    assert document["memory"]["device"] == "cpu"
    assert document["memory"]["peak"] == document["memory"]["checkpointed"]["peak"]
    assert document["flops"]["examples"]["pair"]["recompute"] > 0
    assert document["time"]["hours"] is None


def test_without_a_rate_it_says_how_to_ask_for_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give the sustained rate of one device: --tflops 150" in run(capsys, "my.yaml")[1]


def test_a_run_that_starts_from_one_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "later.yaml", "--set", "model.image_size=32")
    assert code == 0
    assert "runs/quickstart-pretrain is not there; shipped recipes give its model: quickstart/pretrain" in out
    assert "labels" not in out.split("taken to be so")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yaml"], "absent.yaml"),
        (["my.yaml", "--set", "model.heads=3"], "must divide dim (16)"),
        (["my.yaml", "--world", "3"], "2 micro-batches a step (batch.size / batch.micro) can't be dealt to 3"),
        (["my.yaml", "--world", "2", "--set", "parallel.expert=3"], "these sizes fit: 1, 2"),
        (["my.yaml", "--labels", "5"], "--labels 5: pretraining has no labels"),
        (["my.yaml", "--on", "tpu"], "--on tpu: say gpu or cpu"),
        (["my.yaml", "--tflops", "0"], "--tflops"),
        (["later.yaml", "--set", "init=runs/absent"], "name another with --set init=RUN"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_units() -> None:
    assert column([2**30, 2**29, 0, None], BYTES) == ["1.00 GiB", "0.50 GiB", "       0", "       -"]
    assert column([0, 0], BYTES) == ["0", "0"]
    assert [one(n, COUNTS) for n in (0, 7, 1234, 29_771_066, 175_749_120, 1_932_493_824)] == [
        "0", "7", "1.23 k", "29.8 M", "176 M", "1.93 B",
    ]  # fmt: skip
    assert one(1.5e20, OPERATIONS) == "150 EFLOP" and one(36e9, OPERATIONS) == "36.0 GFLOP"
