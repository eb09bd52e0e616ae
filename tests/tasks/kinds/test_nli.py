from pathlib import Path

import pytest
import torch

from tests.tasks.support import example, ranked, record
from vlmoe_core.errors import DataError
from vlmoe_core.tasks.kinds.nli import NLI, Config, open_task

NAMES = ("entailment", "neutral", "contradiction")


def task() -> NLI:
    return open_task(Config())


def test_labels_are_in_glues_order() -> None:
    labels = task().find_labels([example(label="neutral")], [])
    assert labels.names == NAMES
    targets = [task().target(example(label=name), labels, True) for name in NAMES]
    assert [int(t) for t in targets if t is not None] == [0, 1, 2]
    assert task().target(example(), labels, False) is None
    with pytest.raises(DataError, match=r"the label 'contradict' is not one of the model's 3.*contradiction"):
        task().target(example(label="contradict"), labels, False)


def test_accuracy_of_all_and_of_each_subset() -> None:
    truth = ["neutral", "neutral", "entailment", "contradiction", "contradiction"]
    subsets = ["matched", "mismatched", "matched", "matched", None]
    said = ["neutral", "entailment", "neutral", "contradiction", "contradiction"]
    records = [
        record(n, label=label, subset=subset or "")
        for n, (label, subset) in enumerate(zip(truth, subsets, strict=True))
    ]
    scores = task().score(records, [ranked(a) for a in said])
    assert scores.percents() == pytest.approx(
        {"accuracy": 60.0, "accuracy/matched": 200 / 3, "accuracy/mismatched": 0.0}
    )
    assert next(iter(scores.metrics)) == task().best


def test_hidden_labels_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"^test.jsonl:2: holds no 'label'"):
        task().score([record(0, label="neutral"), record(1)], [ranked("neutral")] * 2)


def test_the_submission_is_glues_tsv(tmp_path: Path) -> None:
    records = [record(0, id=0), record(1, id="31193n")]
    task().write_submission(records, [ranked("neutral", "entailment"), ranked("entailment")], tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text() == "index\tprediction\n0\tneutral\n31193n\tentailment\n"


def test_each_subset_has_a_submission_of_its_own(tmp_path: Path) -> None:
    """Their numbers collide."""
    records = [record(n, id=n % 2, subset=("matched", "mismatched")[n // 2]) for n in range(4)]
    said = [ranked(a) for a in ("neutral", "entailment", "contradiction", "neutral")]
    task().write_submission(records, said, tmp_path / "preds.tsv")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "preds-matched.tsv": "index\tprediction\n0\tneutral\n1\tentailment\n",
        "preds-mismatched.tsv": "index\tprediction\n0\tcontradiction\n1\tneutral\n",
    }
    task().write_submission(records[:2], said[:2], tmp_path / "one.tsv")
    assert (tmp_path / "one.tsv").read_text() == "index\tprediction\n0\tneutral\n1\tentailment\n"


def test_read_ranks_the_three() -> None:
    answers = task().read(torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 9.0]]), task().find_labels([], []))
    assert answers[0].labels == ("neutral", "entailment", "contradiction")
    assert answers[1].labels[0] == "contradiction"
    assert all(sum(a.probabilities) == pytest.approx(1) for a in answers)
