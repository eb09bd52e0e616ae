"""Files that were made for BEiT-3 and VLMo are finetuned on, scored and compared with baselines as they are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.files_support import jpeg
from tests.train.tasks_support import finetuned, scored, tuned
from vlmoe_core.tasks.kinds.vqa import VQA
from vlmoe_core.tasks.task import Ranked
from vlmoe_core.tokenizers.text import fit_wordpiece
from vlmoe_core.train.build import whole_dataset
from vlmoe_core.train.scoring import baselines
from vlmoe_core.train.trained import load_trained

ANSWERS = ("red", "green", "2 dogs", "yes")
QUESTIONS = ("what colour is it?", "how many are there?", "is it a card?")
COLOURS = ("red", "green")
TWO_STEPS = ("train.steps=2", "optim.warmup_steps=1")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMOE_CACHE", str(tmp_path / "cache"))


def finetune_on(folder: Path, task: str, source: str, *overrides: str) -> Path:
    """The run folder of a task that trains on and is scored on one source."""
    data = f"data={{root: {folder}, workers: 0, max_text: {{pair: 20}}, train: {source}, test: {source}}}"
    return finetuned(folder, task, data, *TWO_STEPS, *overrides)


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the datasets package (extra data) is absent")
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def beit3_index(folder: Path) -> None:
    """Two pictures with six questions each, and the list that names their answers."""
    tokenizer = fit_wordpiece(QUESTIONS * 3, 200, lowercase=True)
    tokenizer.save(folder / "words")
    for colour in COLOURS:
        (folder / f"{colour}.jpg").write_bytes(jpeg(colour))
    lines = [
        {
            "image_path": f"{COLOURS[number % 2]}.jpg",
            "text_segment": tokenizer.encode(QUESTIONS[number % 3]),
            "labels": [3 - number % 3, 0],
            "scores": [1.0, 0.3],
            "qid": number,
        }
        for number in range(12)
    ]
    (folder / "vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = [{"answer": answer, "label": label} for label, answer in enumerate(ANSWERS)]
    (folder / "answer2label.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


BEIT3 = "{pair: [{source: beit3, path: vqa.jsonl, answers: answer2label.txt}]}"


@pytest.mark.parametrize("named", [False, True], ids=["answers of the files", "answer2label.txt"])
def test_vqa_on_an_index_of_beit3(tmp_path: Path, named: bool) -> None:
    beit3_index(tmp_path)
    listed = [f"task.answers={tmp_path}/answer2label.txt"] if named else []
    run = finetune_on(tmp_path, "vqa", BEIT3, f"tokenizers.text.load={tmp_path}/words", *listed)
    trained = load_trained(run)
    assert trained.tokenizers.labels.names == (ANSWERS if named else ("yes", "red", "2 dogs", "green"))
    evaluated = scored(trained)
    assert len(evaluated.records) == 12 and evaluated.broken == 0
    by_hand = [r.facts["scores"].get(a.labels[0], 0) for r, a in zip(evaluated.records, evaluated.answers, strict=True)]
    assert evaluated.scores is not None
    assert evaluated.scores.percents() == {"accuracy": pytest.approx(100 * sum(by_hand) / 12)}
    # The question tells the answer, though it is stored as token ids.
    found = {one.name: one.scores.percents()["accuracy"] for one in baselines(trained.recipe, evaluated)}
    assert found == {"majority": pytest.approx(100 * 4 / 12), "question-only": 100.0}


def test_vqa_on_a_table_of_vlmo(tmp_path: Path) -> None:
    answered: Sequence[Any] = [[["red"], ["2 dogs", "yes"]], [["green"], ["yes"]]] * 3
    columns = {
        "image": [jpeg(colour) for colour in COLOURS] * 3,
        "questions": [list(QUESTIONS[:2])] * 6,
        "answers": list(answered),
        "answer_scores": [[[1.0], [0.9, 0.3]], [[0.6], [1.0]]] * 3,
        "question_id": [[2 * row, 2 * row + 1] for row in range(6)],
    }
    write_table(tmp_path / "vqav2_train.arrow", columns)
    run = finetune_on(tmp_path, "vqa", "{pair: [{source: vlmo, path: vqav2_train.arrow}]}")
    trained = load_trained(run)
    assert trained.tokenizers.labels.names == ("red", "2 dogs", "yes", "green")
    evaluated = scored(trained)
    assert [r.facts["id"] for r in evaluated.records] == list(range(12))
    right = [Ranked((max(r.facts["scores"], key=r.facts["scores"].get),), (1.0,)) for r in evaluated.records]
    best = VQA(trained.recipe.task).score(evaluated.records, right)  # type: ignore[arg-type]
    assert best.percents()["accuracy"] == pytest.approx(100 * (1 + 0.9 + 0.6 + 1) / 4)
    assert evaluated.scores is not None and 0 <= evaluated.scores.metrics["accuracy"].percent <= 100
    assert best.metrics["accuracy"].groups is not None and best.metrics["accuracy"].groups.tolist() == [
        n // 2 for n in range(12)
    ]


def test_nlvr2_on_a_table_of_vlmo(tmp_path: Path) -> None:
    columns = {
        "image_0": [jpeg(colour) for colour in COLOURS] * 3,
        "image_1": [jpeg("blue")] * 6,
        "questions": [["one is red", "none is red"], ["one is green"]] * 3,
        "answers": [["True", "False"], ["True"]] * 3,
        "identifier": [f"dev-{row}-0" for row in range(6)],
    }
    write_table(tmp_path / "nlvr2_dev.arrow", columns)
    run = finetune_on(tmp_path, "nlvr2", "{pair: [{source: vlmo, path: nlvr2_dev.arrow}]}")
    evaluated = scored(run)
    right = [a.labels[0] == r.facts["label"] for r, a in zip(evaluated.records, evaluated.answers, strict=True)]
    assert len(right) == 9 and evaluated.scores is not None
    assert evaluated.scores.percents() == {"accuracy": pytest.approx(100 * sum(right) / 9)}
    assert evaluated.scores.metrics["accuracy"].groups is not None
    assert evaluated.scores.metrics["accuracy"].groups.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]


def test_other_streams_of_a_split_are_not_opened(tmp_path: Path) -> None:
    """A recipe that is given for its data may have more than the task reads."""
    trained = load_trained(finetuned(tmp_path, "nli", *TWO_STEPS))
    test = trained.recipe.data.test
    absent = tuned(tmp_path, "vqa", "data.test={image: [{source: jsonl, path: absent.jsonl}]}").recipe.data.test
    dataset = whole_dataset(
        trained.recipe, test.model_copy(update={"image": absent.image}), trained.tokenizers, limit=None
    )
    assert list(dataset.streams) == ["text"] and dataset.limit == 14
