"""The Hub from the command line: what verbs push, and models that are named there."""

import shutil
from pathlib import Path

import pytest

from tests.cli.tasks_support import vlmoe
from tests.hub.fake_hub import FakeHub
from tests.hub.fake_repos import TOKEN, Blob
from vlmoe_core.checkpoint.layout import list_checkpoints
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.train.trained import load_trained

NAME = "org/model"


@pytest.fixture
def own(work: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the runs, without what other tests measured."""
    shutil.copytree(work, tmp_path / "work", ignore=shutil.ignore_patterns("results"))
    return tmp_path / "work"


def test_a_run_is_pushed_while_it_trains(hub: FakeHub, own: Path) -> None:
    done = vlmoe(own, "pretrain", "base.yaml", "--out", "runs/pushed", "--push-to", NAME)
    assert done.code == 0, done.err
    repo = hub.store.repos[NAME]
    assert repo.private and {"model.safetensors.index.json", "metrics.jsonl", "report/routing.json"} <= set(
        repo.files()
    )
    titles = [commit.title for commit in repo.commits]
    assert any("step" in title for title in titles[:-1]), titles
    assert b"data:image/webp" not in repo.files()["report/routing.html"]
    ours, theirs = load_trained(Path(f"hf-hub:{NAME}")), load_trained(own / "runs" / "pushed")
    state = theirs.objective.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in ours.objective.state_dict().items())


def test_a_run_trains_on_while_the_hub_is_down(hub: FakeHub, own: Path) -> None:
    hub.fail("POST", "", times=0, status=503)
    done = vlmoe(own, "pretrain", "base.yaml", "--out", "runs/alone", "--push-to", NAME)
    assert done.code == 1 and "run folder" in done.out, "the run itself is done"
    assert list_checkpoints(own / "runs" / "alone")[-1].name == "step-00000006"
    assert "was not pushed: " in done.err and "the run goes on" in done.err
    assert f"step 6 is not on the Hub; to send what is missing: vlmoe push runs/alone --to {NAME}\n" in done.err
    assert done.err.endswith(f". The run itself is done; to push it: vlmoe push runs/alone --to {NAME}\n")
    assert TOKEN not in done.err + done.out and "Traceback" not in done.err
    hub.faults.clear()
    assert vlmoe(own, "push", "runs/alone", "--to", NAME).code == 0
    assert "metrics.jsonl" in hub.store.repos[NAME].files()


def test_a_run_goes_on_from_the_hub(hub: FakeHub, own: Path) -> None:
    assert vlmoe(own, "pretrain", "base.yaml", "--out", "runs/straight").code == 0
    first = list_checkpoints(own / "runs" / "straight")[0]
    assert vlmoe(own, "push", str(first), "--to", NAME, "--with-optimizer").code == 0
    done = vlmoe(own, "pretrain", "base.yaml", "--resume", f"hf-hub:{NAME}", "--out", "runs/resumed")
    assert done.code == 0, done.err
    assert "fitted" not in done.err, "tokenizers come with the checkpoint"
    ours, theirs = (read_checkpoint(list_checkpoints(own / "runs" / run)[-1]) for run in ("resumed", "straight"))
    assert ours.state.step == theirs.state.step == 6
    assert all(ours.model[name].equal(theirs.model[name]) for name in theirs.model)


def test_a_finished_run_on_the_hub_leaves_nothing_to_go_on_with(hub: FakeHub, own: Path) -> None:
    assert vlmoe(own, "pretrain", "base.yaml", "--out", "runs/straight").code == 0
    assert vlmoe(own, "push", "runs/straight", "--to", NAME, "--with-optimizer").code == 0
    done = vlmoe(own, "pretrain", "base.yaml", "--resume", f"hf-hub:{NAME}", "--out", "runs/resumed")
    assert done.code == 2 and "stands at step 6 of 6, so nothing is left to train; start a new run" in done.message
    assert not (own / "runs" / "resumed").exists()


def test_finetuning_and_eval_of_models_on_the_hub(hub: FakeHub, own: Path) -> None:
    assert vlmoe(own, "push", "runs/base", "--to", "org/base").code == 0
    done = vlmoe(own, "finetune", "nli.yaml", "--model", "hf-hub:org/base", "--out", "runs/tuned", "--push-to", NAME)
    assert done.code == 0, done.err
    assert ".eval_results" not in " ".join(hub.store.repos[NAME].files())
    done = vlmoe(own, "eval", "nli", "--model", f"hf-hub:{NAME}", "--push-to", NAME)
    assert done.code == 0, done.err
    files = hub.store.repos[NAME].files()
    assert [name for name in files if name.startswith(".eval_results/")] and "results/nli-test.json" in files
    card = files["README.md"].decode()
    assert "model-index:" in card and "accuracy" in card and "model-00001-of-00001.safetensors" in files
    assert not (own / "results").exists()


def test_eval_keeps_its_result_in_the_run(own: Path) -> None:
    told = vlmoe(own, "eval", "vqa", "--json").data
    kept = own / "runs" / "vqa" / "results" / "vqa-test.json"
    assert kept.exists() and f'"accuracy": {told["metrics"]["accuracy"]}' in kept.read_text()
    assert vlmoe(own, "eval", "vqa", "--limit", "5").code == 0
    assert (kept.parent / "vqa-test-first-5.json").exists()


def test_a_result_that_can_t_be_kept_is_still_printed(own: Path) -> None:
    (own / "runs" / "vqa" / "results").write_text("")
    done = vlmoe(own, "eval", "vqa", "--limit", "3")
    assert done.code == 0 and "accuracy" in done.out and "warning: the result can't be kept in " in done.err


def test_eval_adds_to_what_the_repository_tells(hub: FakeHub, own: Path) -> None:
    assert vlmoe(own, "push", "runs/nli", "--to", NAME, "--license", "mit").code == 0
    words = ("eval", "nli", "--model", f"hf-hub:{NAME}", "--limit", "3", "--push-to", NAME)
    done = vlmoe(own, *words)
    assert done.code == 0, done.err
    assert f"model hf-hub:{NAME}@" in done.err and "snapshots" not in done.err
    assert vlmoe(own, *words, "--split", "eval").code == 0
    repo = hub.store.repos[NAME]
    card = repo.files()["README.md"].decode()
    assert [commit.title for commit in repo.commits[-2:]] == ["Results of vlmoe eval nli"] * 2
    assert "license: mit" in card and "examples of test" in card and "examples of eval" in card
    assert "](report/figures/" in card and "| Hardware |" in card, "of the run that was pushed first"
    assert {"results/nli-test-first-3.json", "results/nli-eval-first-3.json"} <= set(repo.files())
    theirs = {".eval_results/theirs.yaml": Blob(b"[]")}
    repo.add("main", "A benchmark of others", "tester", repo.at("main").files | theirs)
    assert vlmoe(own, "push", "runs/nli", "--to", NAME).out.startswith("nothing new"), "same weights, same results"
    assert vlmoe(own, "finetune", "nli.yaml", "--set", "seed=7", "--out", "runs/other").code == 0
    before = len(repo.commits)
    done = vlmoe(own, "eval", "nli", "--model", "runs/other", "--push-to", NAME)
    assert done.code == 2 and f"{NAME} does not hold the weights of runs/other/checkpoints" in done.message
    assert len(repo.commits) == before
    assert vlmoe(own, "push", "runs/other", "--to", NAME).code == 0
    files = repo.files()
    assert not [name for name in files if name.startswith((".eval_results/", "results/"))], "measured on other weights"
    assert b"license: mit" in files["README.md"] and b"model-index" not in files["README.md"]


def test_a_card_that_somebody_wrote_on_the_hub_stays(hub: FakeHub, own: Path) -> None:
    assert vlmoe(own, "push", "runs/nli", "--to", NAME).code == 0
    repo = hub.store.repos[NAME]
    mine = {"README.md": Blob(b"---\nlicense: mit\n---\n\n# Mine\n")}
    repo.add("main", "By hand", "tester", repo.at("main").files | mine)
    assert vlmoe(own, "push", "runs/nli", "--to", NAME, "--license", "apache-2.0").out.startswith("nothing new")
    assert vlmoe(own, "eval", "nli", "--model", f"hf-hub:{NAME}", "--limit", "8", "--push-to", NAME).code == 0
    assert repo.files()["README.md"].endswith(b"# Mine\n")
    assert "results/nli-test-first-8.json" in repo.files()
    stub = {"README.md": Blob(b"---\nlicense: mit\n---\n")}
    repo.add("main", "As the web page makes it", "tester", repo.at("main").files | stub)
    assert vlmoe(own, "push", "runs/nli", "--to", NAME).code == 0
    assert b"license: mit" in repo.files()["README.md"] and b"# model" in repo.files()["README.md"]


def test_route_stats_adds_its_report(hub: FakeHub, own: Path) -> None:
    shutil.rmtree(own / "runs" / "base" / "report")
    done = vlmoe(own, "route-stats", "--model", "runs/base", "--out", "report", "--push-to", NAME)
    assert done.code == 2 and f"first: vlmoe push runs/base/checkpoints/step-00000002 --to {NAME}" in done.message
    assert vlmoe(own, "push", "runs/base", "--to", NAME).code == 0
    assert b"report/figures" not in hub.store.repos[NAME].files()["README.md"]
    done = vlmoe(own, "route-stats", "--model", "runs/base", "--out", "report", "--push-to", NAME)
    assert done.code == 0, done.err
    files = hub.store.repos[NAME].files()
    assert {"report/routing.json", "report/figures/loads.png", "report/routing.html"} <= set(files)
    assert b"data:image/webp" not in files["report/routing.html"]
    assert b"](report/figures/loads.png)" in files["README.md"]
    assert str(own).encode() not in b"".join(files.values())
    done = vlmoe(own, "route-stats", "--model", "runs/base", "--out", "report", "--push-to", NAME, "--with-images")
    assert done.code == 0, done.err
    assert hub.store.repos[NAME].files()["report/routing.html"] == (own / "report" / "routing.html").read_bytes()


def test_seeds_are_not_pushed(own: Path) -> None:
    done = vlmoe(own, "finetune", "nli.yaml", "--seeds", "2", "--push-to", NAME, "--out", "runs/two")
    assert done.code == 2 and "vlmoe push" in done.message


def test_a_name_that_is_none_is_refused_before_hours_of_work(own: Path) -> None:
    done = vlmoe(own, "pretrain", "base.yaml", "--out", "runs/none", "--push-to", "model")
    assert done.code == 2 and "write ORG/NAME" in done.message
    assert not (own / "runs" / "none").exists()


def test_offline(hub: FakeHub, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = vlmoe(own, "eval", "nli", "--model", "hf-hub:org/nothing")
    assert done.code == 1 and "HF_HUB_OFFLINE is set and the cache does not have it" in done.message


def test_a_branch_may_be_named(hub: FakeHub, own: Path) -> None:
    assert vlmoe(own, "push", "runs/nli", "--to", NAME, "--revision", "try").code == 0
    done = vlmoe(own, "eval", "nli", "--model", "runs/nli", "--push-to", f"{NAME}@try")
    assert done.code == 0, done.err
    assert "results/nli-test.json" in hub.store.repos[NAME].files("try")
    assert "results/nli-test.json" not in hub.store.repos[NAME].files()
    done = vlmoe(own, "eval", "nli", "--model", "runs/nli", "--push-to", NAME)
    assert done.code == 2 and f"--to {NAME}" in done.message and "--revision" not in done.message
