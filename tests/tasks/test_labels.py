import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.errors import DataError
from vlmoe_core.tasks.labels import NO_LABELS, Labels, load_labels, sorted_labels


def test_numbers_are_places() -> None:
    labels = Labels(("yes", "no", "2"))
    assert [labels.number(name) for name in labels.names] == [0, 1, 2]
    assert labels.index == {"yes": 0, "no": 1, "2": 2}


def test_an_unknown_label_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"the label 'contradicts' is not one of the model's 2.*contradiction"):
        Labels(("neutral", "contradiction")).number("contradicts")


@given(names=st.lists(st.text(), unique=True))
def test_they_come_back_from_a_folder(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("run") / "labels"
    Labels(tuple(names)).save(folder)
    assert load_labels(folder) == Labels(tuple(names))


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    Labels(("rouge", "été")).save(tmp_path / "labels")
    text = (tmp_path / "labels" / "labels.json").read_text(encoding="utf-8")
    assert json.loads(text) == ["rouge", "été"] and "été" in text


def test_no_folder_is_no_labels(tmp_path: Path) -> None:
    assert load_labels(tmp_path / "absent") == NO_LABELS == Labels()


def test_sorted_labels_are_distinct() -> None:
    assert sorted_labels(["n03", "n01", "n03", "n02"]).names == ("n01", "n02", "n03")
