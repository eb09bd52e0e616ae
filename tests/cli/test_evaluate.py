"""`vlmoe eval` as it is typed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.tasks_support import rows_of, vlmoe
from tests.train.tasks_support import TASKS, recipe_text

SIZES = {"vqa": 28, "nlvr2": 28, "retrieval": 28, "classification": 14, "nli": 14}


def test_vqa_alone_works_as_typed(work: Path) -> None:
    """A process of its own, in a folder with runs/."""
    command = [sys.executable, "-m", "vlmoe_cli", "eval", "vqa"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stderr.splitlines()
    assert first == "model runs/vqa/checkpoints/step-00000004, step 4; data.test of its own recipe"
    assert re.fullmatch(r"expected time: about \d+ s for 4 batches", second)
    table = list(rows_of(done.stdout))
    assert table[0] == ["vqa, 28 examples of test"]
    assert table[1] == ["metric", "percent", "95 % interval", "majority", "question-only"]
    assert table[2][0] == "accuracy" and re.fullmatch(r"[\d.]+ to [\d.]+", table[2][2])


@pytest.mark.parametrize("task", TASKS)
def test_json_holds_what_machines_want(work: Path, task: str) -> None:
    told = vlmoe(work, "eval", task, "--json").data
    assert told.keys() >= {"task", "model", "split", "n", "metrics", "intervals", "baselines"}
    assert (told["task"], told["split"], told["n"]) == (task, "test", SIZES[task])
    assert told["model"] == f"runs/{task}/checkpoints/step-00000004"
    assert set(told["intervals"]) <= set(told["metrics"])
    for name, (low, high) in told["intervals"].items():
        assert 0 <= low <= told["metrics"][name] <= high <= (600 if name == "rsum" else 100)
    blind = {"vqa": "question-only", "nlvr2": "statement-only", "nli": "hypothesis-only"}
    chance = ["chance"] if task == "retrieval" else ["majority", *([blind[task]] if task in blind else [])]
    assert list(told["baselines"]) == chance
    assert all(set(found) <= set(told["metrics"]) for found in told["baselines"].values())


@pytest.mark.parametrize(("alias", "task"), [("imagenet", "classification"), ("mnli", "nli")])
def test_aliases(work: Path, alias: str, task: str) -> None:
    assert vlmoe(work, "eval", alias, "--json").data == vlmoe(work, "eval", task, "--json").data


@pytest.mark.parametrize(
    ("typed", "hint"), [("vqq", "did you mean 'vqa'"), ("imagnet", "did you mean 'imagenet'"), ("xyz", "known: class")]
)
def test_an_unknown_task_gets_the_nearest_word(work: Path, typed: str, hint: str) -> None:
    done = vlmoe(work, "eval", typed)
    assert done.code == 2 and f"no task '{typed}'; {hint}" in done.message


@pytest.mark.parametrize("task", TASKS)
def test_without_a_run_one_line_names_the_command_that_makes_one(tmp_path: Path, task: str) -> None:
    done = vlmoe(tmp_path, "eval", task)
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"no finished run under runs/ was finetuned on {task}; make one with 'vlmoe finetune quickstart/{task}'" in (
        done.message
    )


def test_a_model_of_another_task_or_none_is_refused(work: Path) -> None:
    assert (
        "runs/nli was finetuned on nli; to use it on vqa" in vlmoe(work, "eval", "vqa", "--model", "runs/nli").message
    )
    assert "runs/base was pretrained, not finetuned" in vlmoe(work, "eval", "vqa", "--model", "runs/base").message
    assert "no checkpoint at nothing" in vlmoe(work, "eval", "vqa", "--model", "nothing").message


def test_split_and_limit(work: Path) -> None:
    told = vlmoe(work, "eval", "vqa", "--split", "eval", "--json").data
    assert (told["split"], told["n"]) == ("eval", 12)
    assert vlmoe(work, "eval", "vqa", "--split", "train", "--limit", "5", "--json").data["n"] == 5
    done = vlmoe(work, "eval", "vqa", "--split", "dev")
    assert done.code == 2
    assert "--split dev: data.dev.pair has no source; these have: test, eval, train" in done.message


def test_other_data(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(recipe_text("vqa").replace("size: 14", "size: 3"))
    done = vlmoe(work, "eval", "vqa", "--data", str(path), "--json")
    assert done.data["n"] == 6 and f"data.test of {path}" in done.err
    assert "no recipe 'nothing'" in vlmoe(work, "eval", "vqa", "--data", "nothing").message
    (tmp_path / "wrong.yaml").write_text("data: {train: {}, tst: {}}\n")
    message = vlmoe(work, "eval", "vqa", "--data", str(tmp_path / "wrong.yaml")).message
    assert re.search(r"wrong\.yaml:1: .*tst: unknown key; did you mean 'test'", message)


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "nli", "classification"])
def test_submission_is_written_beside_the_scores(work: Path, tmp_path: Path, task: str) -> None:
    file = tmp_path / "answers"
    done = vlmoe(work, "eval", task, "--submission", str(file))
    assert done.code == 0 and f"{SIZES[task]} answers written: {file}" in done.out
    assert f"{task}, {SIZES[task]} examples of test" in done.out
    text = file.read_text()
    if task == "vqa":
        found = json.loads(text)
        assert len(found) == 28 and all(one.keys() == {"question_id", "answer"} for one in found)
    else:
        lines = text.splitlines()
        assert len(lines) == SIZES[task] + (task == "nli")
        assert lines[0] == "index\tprediction" if task == "nli" else "," in lines[0]
    failed = vlmoe(work, "eval", task, "--submission", str(tmp_path / "no" / "answers"))
    assert failed.code == 2 and "can't be written" in failed.err


def test_retrieval_has_no_submission(work: Path, tmp_path: Path) -> None:
    done = vlmoe(work, "eval", "retrieval", "--submission", str(tmp_path / "file"))
    assert done.code == 2 and "retrieval has no server" in done.message


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_model_compared_with_itself(work: Path, task: str) -> None:
    done = vlmoe(work, "eval", task, "--compare", f"runs/{task}", "--json")
    found = done.data["comparison"]
    assert (found["difference"], found["interval"], found["p_value"]) == (0, [0, 0], 1)
    assert f"compared with runs/{task}/checkpoints/step-00000004, step 4" in done.err


def test_two_models_side_by_side(work: Path, tmp_path: Path) -> None:
    more = ("--set", "train.steps=12", "--set", "optim.lr=3e-2", "--set", "seed=11", "--out", str(tmp_path / "other"))
    assert vlmoe(work, "finetune", "vqa.yaml", *more).code == 0
    done = vlmoe(work, "eval", "vqa", "--compare", str(tmp_path / "other"))
    assert done.code == 0, done.err
    shown = dict((cells[0], cells[1:]) for cells in rows_of(done.out) if len(cells) > 1)
    assert "Paired comparison, percentage points" in done.out
    assert shown["metric"] and {"difference", "interval", "p_value", "other", "other_percent"} <= set(shown)
    first, second = (
        vlmoe(work, "eval", "vqa", "--model", str(run), "--json").data["metrics"]["accuracy"]
        for run in ("runs/vqa", tmp_path / "other")
    )
    assert float(shown["difference"][0]) == pytest.approx(first - second, abs=0.01)
    refused = vlmoe(work, "eval", "vqa", "--compare", "runs/nli")
    assert refused.code == 2 and "was finetuned on nli" in refused.message


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A recipe with class folders of 16 x 16 pixels, one picture of which is torn."""
    for number in range(6):
        place = tmp_path / "photos" / ("circle" if number < 3 else "star")
        place.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(noise).save(place / f"{number}.png")
    (tmp_path / "photos" / "star" / "4.png").write_bytes(b"torn")
    recipe = tmp_path / "photos.yaml"
    source = f"image: [{{source: image-folder, path: {tmp_path / 'photos'}}}]"
    recipe.write_text(f"data: {{workers: 0, train: {{}}, test: {{{source}}}}}\n")
    return recipe


def test_a_broken_picture_is_named(work: Path, photos: Path) -> None:
    for more in ((), ("--on-error", "raise")):
        done = vlmoe(work, "eval", "classification", "--data", str(photos), *more)
        assert done.code == 1 and re.search(r"star/4\.png: .* \(position 4 of the image stream\)", done.message)


def test_or_skipped_and_counted(work: Path, photos: Path) -> None:
    done = vlmoe(work, "eval", "classification", "--data", str(photos), "--on-error", "skip", "--json")
    assert (done.data["n"], done.data["broken"]) == (5, 1)
    shown = vlmoe(work, "eval", "classification", "--data", str(photos), "--on-error", "skip").out
    assert "5 examples of test, 1 broken left out" in shown
    wrong = vlmoe(work, "eval", "classification", "--on-error", "stop")
    assert wrong.code == 2 and "--on-error stop: give raise or skip" in wrong.message


def hidden_test_set(folder: Path) -> Path:
    """A recipe of questions in the files of VQA v2, without annotations."""
    questions = [{"question_id": 10 + n, "image_id": n, "question": "what colour is the circle?"} for n in range(3)]
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    for number in range(3):
        Image.new("RGB", (16, 16), "red").save(folder / f"{number}.png")
    source = f"{{source: vqa, questions: {folder}/questions.json, images: '{folder}/{{image_id}}.png'}}"
    (folder / "hidden.yaml").write_text(f"data:\n  workers: 0\n  train: {{}}\n  test:\n    pair: [{source}]\n")
    return folder / "hidden.yaml"


def test_hidden_answers_are_written_not_scored(work: Path, tmp_path: Path) -> None:
    recipe, file = str(hidden_test_set(tmp_path)), tmp_path / "answers.json"
    done = vlmoe(work, "eval", "vqa", "--data", recipe, "--submission", str(file), "--json")
    assert done.data["n"] == 3 and "metrics" not in done.data
    assert [one["question_id"] for one in json.loads(file.read_text())] == [10, 11, 12]
    refused = vlmoe(work, "eval", "vqa", "--data", recipe)
    assert refused.code == 1 and "--submission FILE" in refused.message


def test_a_model_whose_training_data_is_gone_is_scored_without_baselines(work: Path, tmp_path: Path) -> None:
    """The run folder alone is enough."""
    questions = [{"question_id": n, "image_id": n, "question": "what colour is it?"} for n in range(8)]
    said = [{"answer": "red"}] * 10
    given = [{"question_id": n, "answers": said, "multiple_choice_answer": "red", "image_id": n} for n in range(8)]
    for name, found in (("questions", questions), ("annotations", given)):
        (tmp_path / f"{name}.json").write_text(json.dumps({name: found}))
    for number in range(8):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{number}.png")
    files = f"questions: {tmp_path}/questions.json, annotations: {tmp_path}/annotations.json"
    source = f"data.train.pair=[{{source: vqa, {files}, images: '{tmp_path}/{{image_id}}.png'}}]"
    run = ("--set", source, "--set", "train.steps=2", "--out", str(tmp_path / "run"))
    assert vlmoe(work, "finetune", "vqa.yaml", *run).code == 0
    asked = ("eval", "vqa", "--model", str(tmp_path / "run"), "--json")
    assert vlmoe(work, *asked).data["baselines"].keys() == {"majority", "question-only"}
    (tmp_path / "questions.json").unlink()
    done = vlmoe(work, *asked)
    assert done.data["baselines"] == {} and done.data["n"] == 28
    assert "warning: no baselines: the training data of the model's recipe can't be read (nothing matches" in done.err


def test_several_processes_print_one_document(work: Path) -> None:
    """With --compare too: every process scores its share of both models."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    typed = ["vlmoe_cli", "eval", "retrieval", "--compare", "runs/retrieval", "--json"]
    done = subprocess.run([*command, *typed], cwd=work, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    told, alone = json.loads(done.stdout), vlmoe(work, "eval", "retrieval", "--json").data
    assert told.pop("comparison")["p_value"] == 1
    assert told == alone
    assert done.stderr.count("model runs/retrieval/") == 1 and "destroy_process_group" not in done.stderr
