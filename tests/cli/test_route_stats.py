"""`vlmoe route-stats` as it is typed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tasks_support import vlmoe


def test_alone_it_works_as_typed(work: Path, tmp_path: Path) -> None:
    """A process of its own, in a folder with runs/."""
    shutil.copytree(work, tmp_path / "work")
    command = [sys.executable, "-m", "vlmoe_cli", "route-stats"]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert first.startswith("model runs/") and "capacity vision 1.25 (training), text 1.25 (training)" in first
    assert "Routing, shares in percent" in done.stdout and "written: runs/" in done.stdout


def told(work: Path, *arguments: str) -> dict[str, Any]:
    out = work / "reports"
    return vlmoe(work, "route-stats", "--out", str(out), *arguments, "--json").data


def test_files_hold_what_is_printed(work: Path, tmp_path: Path) -> None:
    found = vlmoe(work, "route-stats", "--model", "runs/base", "--out", str(tmp_path / "r"), "--json").data
    assert json.loads((tmp_path / "r" / "routing.json").read_text()) == found
    assert found["schema"] == 1 and next(iter(found)) == "schema"
    assert "<html" in (tmp_path / "r" / "routing.html").read_text()[:400]
    assert {f.name for f in (tmp_path / "r" / "figures").iterdir()} >= {"loads.png"}
    tasks = {(cell["task"], cell["modality"]) for cell in found["cells"]}
    assert tasks == {("mlm", "text"), ("mim", "vision"), ("vlm", "text"), ("vlm", "vision")}
    for cell in found["cells"]:
        assert all(wanted >= got for wanted, got in zip(cell["wanted"], cell["got"], strict=True))
        assert sum(cell["first"]) == cell["tokens"] == sum(map(sum, cell["places"]))


def test_capacity_decides_what_is_dropped(work: Path) -> None:
    dropped = {}
    for capacity in ("dropless", "eval", "0.5"):
        found = told(work, "--model", "runs/base", "--capacity", capacity)
        dropped[capacity] = sum(sum(c["wanted"]) - sum(c["got"]) for c in found["cells"])
        assert found["capacity"]["vision"].startswith({"eval": "dropless (evaluation)"}.get(capacity, capacity))
    assert dropped["dropless"] == dropped["eval"] == 0 < dropped["0.5"]


def test_tasks_and_limit(work: Path) -> None:
    found = told(work, "--model", "runs/base", "--tasks", "mlm, mim", "--limit", "5")
    assert {cell["task"] for cell in found["cells"]} == {"mlm", "mim"}
    assert found["examples"] == {"text": 5, "image": 5}


def test_data_of_a_task_routed_by_a_pretrained_model(work: Path) -> None:
    found = told(work, "--model", "runs/base", "--data", "vqa.yaml")
    assert {cell["task"] for cell in found["cells"]} == {"vqa"} and found["data"] == "data.test of vqa.yaml"
    again = told(work, "--model", "runs/base", "--data", "runs/vqa")
    assert again["cells"] == found["cells"]


def test_a_pretrained_model_is_asked_for_classes(work: Path) -> None:
    found = told(work, "--model", "runs/base", "--data", "classification.yaml", "--split", "train", "--limit", "16")
    assert {cell["task"] for cell in found["cells"]} == {"classification"}
    assert all(cell["information"]["class"]["labels"] > 1 for cell in found["cells"])


@pytest.mark.parametrize("task", ["classification", "nlvr2", "retrieval"])
def test_finetuned_models(work: Path, task: str) -> None:
    found = told(work, "--model", f"runs/{task}")
    wanted = {"retrieval image", "retrieval text", "retrieval pair"} if task == "retrieval" else {task}
    assert {cell["task"] for cell in found["cells"]} <= wanted and found["cells"]
    assert set(found["group"]) == set(found["examples"]) and all(found["group"].values())
    if task == "classification":
        assert "class" in found["cells"][0]["information"]


def test_a_copied_checkpoint_leaves_its_report_here(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "runs" / "base" / "checkpoints", tmp_path / "copied")
    (checkpoint, *_) = sorted((tmp_path / "copied").iterdir())
    assert vlmoe(tmp_path, "route-stats", "--model", f"copied/{checkpoint.name}", "--limit", "2").code == 0
    assert (tmp_path / "report" / "routing.html").is_file()


def test_a_model_agrees_with_itself(work: Path) -> None:
    found = told(work, "--model", "runs/base", "--compare", "runs/base", "--limit", "4")
    assert found["other"].startswith("base/checkpoints/") and len(found["comparison"]) == len(found["cells"])
    for cell in found["comparison"]:
        assert cell["same"] == 1 and cell["chance"] <= 1 and cell["tokens"] > 0


def test_two_processes_count_the_same(work: Path, tmp_path: Path) -> None:
    asked = ("--model", "runs/base", "--split", "train", "--limit", "7")  # several groups, the last one smaller
    alone = told(work, *asked)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "vlmoe_cli"]
    command += ["route-stats", *asked, "--out", str(tmp_path / "r"), "--json"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    exact = ("tokens", "wanted", "got", "first", "places", "kinds", "flow", "dropped_by_kind", "words")
    assert found["examples"] == alone["examples"]
    assert all(alone["examples"][stream] > size for stream, size in alone["group"].items())
    for here, there in zip(alone["cells"], found["cells"], strict=True):
        assert {name: here[name] for name in exact} == {name: there[name] for name in exact}
        assert there["entropy"] == pytest.approx(here["entropy"], rel=1e-9)


def test_the_raw_trace_adds_up_to_the_counts(work: Path, tmp_path: Path) -> None:
    found = told(work, "--model", "runs/base", "--capacity", "0.7", "--raw", str(tmp_path / "t.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for cell in found["cells"]:
        own = [r for r in records if all(r[key] == cell[key] for key in ("task", "layer", "modality"))]
        assert len(own) == cell["tokens"] == sum(len(r["experts"]) for r in own) / cell["top_k"]
        for expert in range(cell["num_experts"]):
            kept = sum(k for r in own for e, k in zip(r["experts"], r["kept"], strict=True) if e == expert)
            assert kept == cell["got"][expert] and sum(r["experts"][0] == expert for r in own) == cell["first"][expert]
        assert all((r["token"] is None) == (cell["modality"] == "vision") and 0 < r["gates"][0] <= 1 for r in own)
    pq = pytest.importorskip("pyarrow.parquet")
    told(work, "--model", "runs/base", "--capacity", "0.7", "--raw", str(tmp_path / "t.parquet"))
    read = pq.read_table(tmp_path / "t.parquet").to_pylist()
    exact = ("task", "layer", "modality", "example", "sequence", "place", "kind", "token", "experts", "kept")
    assert [{k: r[k] for k in exact} for r in read] == [{k: r[k] for k in exact} for r in records]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl", "t.parquet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--raw", "trace.csv"), "--raw trace.csv: give a file that ends in .jsonl or .parquet"),
        (("--capacity", "much"), "--capacity much: give train, eval, dropless, or a factor above 0, at most"),
        (("--capacity", "-1"), "--capacity -1: give train"),
        (("--capacity", "1e30"), "--capacity 1e30: give train"),
        (("--out", "base.yaml"), "no report can be written to base.yaml"),
        (("--tasks", "mln"), "--tasks mln: this data has no such task; did you mean 'mlm'"),
        (("--split", "test"), "--split test: data.test has no source; these have: eval, train"),
        (("--compare", "nothing"), "no checkpoint at nothing"),
        (("--data", "nothing.yaml"), "nothing.yaml"),
    ],
)
def test_what_does_not_fit_gets_one_message(work: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in vlmoe(work, "route-stats", "--model", "runs/base", *arguments).message


def test_without_a_run_one_line_names_the_command_that_makes_one(tmp_path: Path) -> None:
    message = vlmoe(tmp_path, "route-stats").message
    assert "no finished run under runs/ has experts; make one with 'vlmoe pretrain quickstart/pretrain'" in message


def test_every_run_ends_with_a_report_on_what_it_was_evaluated_on(work: Path) -> None:
    for run in ("base", "vqa"):
        assert (work / "runs" / run / "report" / "routing.html").is_file()
        plain = json.loads((work / "runs" / run / "report" / "routing.json").read_text())
        assert plain["data"] == "data.eval of its own recipe"
        lines = [json.loads(line) for line in (work / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        told = [key for line in lines if line["split"] == "eval" for key in line if key.startswith("routing/")]
        assert any(key.endswith("/gini") for key in told)
        assert not any(key.startswith("routing/") for line in lines if line["split"] == "train" for key in line)


def test_a_run_on_pictures_alone_ends_with_a_report(work: Path, tmp_path: Path) -> None:
    nothing = [f"data.{split}.{stream}=[]" for split in ("train", "eval") for stream in ("text", "pair")]
    sizes = [f"batch.{key}.{stream}=0" for key in ("size", "micro") for stream in ("text", "pair")]
    words = [word for override in (*nothing, *sizes, "train.steps=2") for word in ("--set", override)]
    done = vlmoe(work, "pretrain", "base.yaml", *words, "--out", str(tmp_path / "run"))
    assert done.code == 0 and "no report" not in done.err, done.err
    found = json.loads((tmp_path / "run" / "report" / "routing.json").read_text())
    assert {(cell["task"], cell["modality"]) for cell in found["cells"]} == {("mim", "vision")}
