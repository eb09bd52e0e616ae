import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tasks.support import LABELS, example, ranked, record
from vlmoe_core.errors import DataError
from vlmoe_core.tasks.kinds.classification import Classification, Config, open_task
from vlmoe_core.tasks.labels import Labels


def task() -> Classification:
    return open_task(Config())


def test_labels_are_those_of_training_in_alphabetical_order() -> None:
    train = [example(label=name) for name in ("n03", "n01", "n03")] + [example()]
    assert task().find_labels(train, [example(label="n00")]).names == ("n01", "n03")
    with pytest.raises(DataError, match=r"no picture of data.train.image has a label"):
        task().find_labels([example()], [example(label="n00")])


def test_targets_are_numbers() -> None:
    targets = [task().target(example(label=name), LABELS, True) for name in LABELS.names]
    assert [int(t) for t in targets if t is not None] == list(range(6))
    assert task().target(example(), LABELS, False) is None
    with pytest.raises(DataError, match="has no label, which training needs"):
        task().target(example(), LABELS, True)
    with pytest.raises(DataError, match=r"the label 'bea' is not one of the model's 6.*bee"):
        task().target(example(label="bea"), LABELS, False)


def test_top1_and_top5_against_sorting() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 6))
    truth = rng.integers(6, size=200)
    answers = task().read(torch.from_numpy(logits), LABELS)
    records = [record(n, label=LABELS.names[t]) for n, t in enumerate(truth)]
    places = [list(np.argsort(-row)).index(t) for row, t in zip(logits, truth, strict=True)]
    assert task().score(records, answers).percents() == pytest.approx(
        {"top1": 100 * np.mean([p < 1 for p in places]), "top5": 100 * np.mean([p < 5 for p in places])}
    )
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert answers[0].probabilities == pytest.approx(sorted(softmax[0], reverse=True)[:5], rel=1e-5)


def test_few_classes_have_no_top5() -> None:
    scores = task().score([record(0, label="bee"), record(1, label="ant")], [ranked("bee", "ant")] * 2)
    assert scores.percents() == {"top1": 50.0}


@pytest.mark.parametrize(("classes", "metrics"), [(4, ["top1"]), (5, ["top1"]), (6, ["top1", "top5"])])
def test_top5_needs_more_than_five_classes(classes: int, metrics: list[str]) -> None:
    labels = Labels(LABELS.names[:classes])
    answers = task().read(torch.randn(3, classes), labels)
    assert list(task().score([record(n, label="bee") for n in range(3)], answers).metrics) == metrics


def test_hidden_labels_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"^test.jsonl:1: holds no 'label'"):
        task().score([record(0, id="a.jpg")], [ranked("bee")])


def test_the_submission_is_a_csv(tmp_path: Path) -> None:
    records = [record(0, id="ILSVRC2012_test_1.JPEG"), record(1)]
    task().write_submission(records, [ranked("bee", "ant"), ranked("cat")], tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "ILSVRC2012_test_1.JPEG,bee,ant\ntest.jsonl:2,cat\n"


def test_labels_of_several_words_are_read_back(tmp_path: Path) -> None:
    names = ("tench, Tinca tinca", 'the "red" fox', "cat")
    task().write_submission([record(0, id="a.jpg")], [ranked(*names)], tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a.jpg", *names]]
