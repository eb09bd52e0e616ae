from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tasks.support import example, ranked, record
from vlmoe_core.data.example import Example
from vlmoe_core.errors import DataError
from vlmoe_core.tasks.kinds.nlvr2 import NLVR2, Config, open_task
from vlmoe_core.tasks.labels import Labels

CASES = [
    ("dev-0-0-0", "True", "True"),
    ("dev-0-1-0", "False", "False"),
    ("dev-0-0-1", "True", "False"),
    ("dev-0-1-1", "True", "True"),
    ("dev-7-2-0", "False", "False"),
    ("test1-0-0-0", "True", "False"),
]
"""Identifier, label, prediction."""


def task() -> NLVR2:
    return open_task(Config())


def of_two(**facts: str) -> Example:
    """An example with two pictures."""
    return replace(example(**facts), more_images=(b"",))


def test_another_number_of_pictures_is_refused() -> None:
    with pytest.raises(DataError, match=r"has 1 pictures, the head takes 2; set task\.num_images"):
        task().checked_target(example(label="True"), Labels(("False", "True")), True)


def test_labels_and_targets() -> None:
    labels = task().find_labels([example(label="True")], [])
    assert labels.names == ("False", "True")
    targets = [task().target(of_two(label=name), labels, True) for name in ("False", "True")]
    assert [int(t) for t in targets if t is not None] == [0, 1]
    assert task().target(of_two(id="x"), labels, False) is None
    with pytest.raises(DataError, match="has no label, which training needs"):
        task().target(of_two(id="x"), labels, True)
    with pytest.raises(DataError, match="the label 'true' is not one of the model's 2"):
        task().target(of_two(label="true"), labels, True)


def test_accuracy_and_consistency_by_hand() -> None:
    records = [record(n, id=identifier, label=label) for n, (identifier, label, _) in enumerate(CASES)]
    scores = task().score(records, [ranked(said) for *_, said in CASES])
    # Of the statements dev-0-0, dev-0-1, dev-7-0 and test1-0-0 the first and the third are right throughout.
    assert scores.percents() == pytest.approx({"accuracy": 100 * 4 / 6, "consistency": 50.0})
    groups = scores.metrics["accuracy"].groups
    assert groups is not None
    assert [groups[i] == groups[j] for i, j in ((0, 1), (2, 3), (0, 2), (0, 4), (0, 5))] == [True, True] + [False] * 3


def test_nlvr_groups_by_sentence() -> None:
    records = [record(n, id=identifier, label="True") for n, identifier in enumerate(("5-0", "5-1", "6-0"))]
    scores = task().score(records, [ranked(said) for said in ("True", "False", "True")])
    assert scores.percents() == pytest.approx({"accuracy": 200 / 3, "consistency": 50.0})


@pytest.mark.parametrize("identifiers", [["dev-850-0"] * 4, ["dev-0-0-0", "dev-0-0-1", "dev-7-1", "dev-7-1-1"]])
def test_identifiers_of_pairs_give_accuracy_alone(identifiers: list[str]) -> None:
    """VLMo's tables have no others; statements of one pair of pictures are drawn together."""
    records = [record(n, image_id=n // 2, id=identifier, label="True") for n, identifier in enumerate(identifiers)]
    scores = task().score(records, [ranked(said) for said in ("True", "False", "True", "True")])
    assert scores.percents() == {"accuracy": 75.0}
    assert scores.metrics["accuracy"].groups is not None and scores.metrics["accuracy"].groups.tolist() == [0, 0, 1, 1]


def test_hidden_labels_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"^test.jsonl:1: holds no 'label', so it can't be scored"):
        task().score([record(0, id="test2-0-0-0")], [ranked("True")])
    assert not task().can_score([record(0, id="test2-0-0-0")])


def test_the_submission_is_a_csv(tmp_path: Path) -> None:
    records = [record(n, id=identifier) for n, (identifier, *_) in enumerate(CASES[:2])]
    task().write_submission(records, [ranked("True", "False"), ranked("False", "True")], tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "dev-0-0-0,True\ndev-0-1-0,False\n"


def test_read_is_a_softmax() -> None:
    (answer,) = task().read(torch.tensor([[0.0, 1.0]]), task().find_labels([], []))
    assert answer.labels == ("True", "False")
    assert answer.probabilities == pytest.approx(np.array([np.e, 1]) / (np.e + 1))
