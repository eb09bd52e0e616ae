import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.support import VOCAB, collate_of, config_of, samples_of
from tests.tasks.support import example, ranked, record
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tasks.kinds.vqa import VQA, Config, open_task, read_answers
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.metrics.vqa import vqa_accuracy

TEN = ("red", "red", "Red", "blue", "green", "green", "green", "green", "green", "dark red")


def task_of(**values: Any) -> VQA:
    return open_task(Config(**values))


def asked(*answers: str) -> Iterator[Any]:
    return (example(answer=answer) for answer in answers)


def test_the_list_counts_normalised_answers_of_train_then_held_out() -> None:
    train = [*["Two"] * 2, *["the dog!"] * 3, *["cat"] * 2, "rare"]
    held_out = [*["a dog"] * 1, *["cat"] * 1, *["2"] * 1, *["late"] * 3]
    assert task_of(min_count=3).find_labels(asked(*train), asked(*held_out)).names == ("2", "dog", "cat", "late")
    alone = task_of(min_count=3, held_out_answers=False)
    assert alone.find_labels(asked(*train), asked(*held_out)).names == ("dog",)


def test_nine_occurrences_are_asked_for_by_default() -> None:
    train, held_out = asked(*["yes"] * 5, *["no"] * 9), asked(*["yes"] * 4, *["maybe"] * 8)
    assert task_of().find_labels(train, held_out).names == ("yes", "no")


def test_examples_that_hide_their_answer_count_nothing() -> None:
    train = [example(answers=("x",)), *asked("y", "y")]
    assert task_of(min_count=2).find_labels(train, [example()]).names == ("y",)


def test_answers_of_stored_scores_are_listed_as_they_come() -> None:
    stored = [example(scores={"net": 0.3, "yes": 1.0}), example(id=3), example(scores={"2 dogs": 0.6, "net": 1.0})]
    held_out = [example(scores={"late": 0.3})]
    assert task_of().find_labels(stored, held_out).names == ("net", "yes", "2 dogs", "late")
    assert task_of(held_out_answers=False).find_labels(stored, held_out).names == ("net", "yes", "2 dogs")
    mixed = [*stored, *asked(*["yes"] * 9, "rare", *["no"] * 9)]
    assert task_of().find_labels(mixed, []).names == ("yes", "no", "net", "2 dogs")


def test_no_frequent_answer_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no answer occurs 9 times .*; lower task.min_count, or name a list"):
        task_of().find_labels(asked("yes"), [])


@pytest.mark.parametrize("content", [["no", "yes", "2"], {"yes": 1, "2": 2, "no": 0}])
def test_the_list_is_read_from_a_file(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(content))
    assert task_of(answers=str(path)).find_labels(asked("red"), []).names == ("no", "yes", "2")


def test_the_list_is_read_from_answer2label(tmp_path: Path) -> None:
    path = tmp_path / "answer2label.txt"
    lines = [{"answer": answer, "label": label} for label, answer in enumerate(("no", "yes", "2"))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert task_of(answers=str(path)).find_labels(asked("red"), []).names == ("no", "yes", "2")
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    with pytest.raises(
        DataError, match=r"^task.answers: .*answer2label.txt:1: must have an answer and label 0, not '2'"
    ):
        read_answers(path)
    path.write_text("".join(json.dumps({"answer": "yes", "label": label}) + "\n" for label in (0, 1)))
    with pytest.raises(DataError, match=r"^task.answers: .*answer2label.txt holds 'yes' twice"):
        read_answers(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["yes", "no", "yes"]', "holds 'yes' twice"),
        ('{"yes": 0, "no": 2}', "holds no JSON list of answers"),
        ('{"yes": 0, "no": 0}', "holds no JSON list of answers"),
        ('{"yes": 0, "no": "1"}', "holds no JSON list of answers"),
        ('{"yes": [0]}', "holds no JSON list of answers"),
        ("{}", "holds no JSON list of answers"),
        ("[]", "holds no JSON list of answers"),
        ('["yes", 2]', "holds no JSON list of answers"),
        ('"yes"', "holds no JSON list of answers"),
        ('{"answer": "yes", "label": 0}\n{"answer": "no", "label": 1}', "can't be read as JSON: Extra data"),
    ],
)
def test_a_file_without_a_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "answers.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^task.answers: .*answers.json {message}"):
        read_answers(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^task.answers: .*none.json can't be read as JSON"):
        read_answers(tmp_path / "none.json")


def test_soft_targets_count_answers_as_written() -> None:
    labels = Labels(("green", "red", "blue", "yes", "dark red"))
    target = task_of().target(example(answers=TEN), labels, training=True)
    assert target is not None and target.dtype == np.float32
    by_count = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}
    assert target.tolist() == pytest.approx([by_count.get(TEN.count(name), 1.0) for name in labels.names])
    assert target.tolist() == pytest.approx([1.0, 0.6, 0.3, 0.0, 0.3])


def test_stored_scores_are_targets_as_they_are() -> None:
    target = task_of().target(example(scores={"b": 0.6, "unknown": 1.0}), Labels(("a", "b")), training=True)
    assert target is not None and target.tolist() == pytest.approx([0, 0.6])


@pytest.mark.parametrize(
    ("facts", "named"), [({"answers": ("mauve", "Red")}, "'mauve', 'Red'"), ({"scores": {}}, "none")]
)
def test_a_question_without_a_known_answer(facts: dict[str, Any], named: str) -> None:
    labels = Labels(("red", "blue"))
    with pytest.raises(DataError, match=rf"none of its answers \({named}\) is in the list of 2"):
        task_of().target(example(**facts), labels, training=True)
    target = task_of().target(example(**facts), labels, training=False)
    assert target is not None and target.tolist() == [0, 0]


def test_a_question_about_two_pictures_is_refused() -> None:
    labels, one = Labels(("red",)), example(answers=["red"])
    assert task_of().checked_target(one, labels, training=True) is not None
    with pytest.raises(DataError, match=r"^has 2 pictures, the head takes 1; leave the others away$"):
        task_of().checked_target(replace(one, more_images=(b"",)), labels, training=True)


def test_hidden_answers_give_no_target() -> None:
    assert task_of().target(example(id=3), Labels(("red",)), False) is None
    with pytest.raises(DataError, match="has no answers, which training needs"):
        task_of().target(example(id=3), Labels(("red",)), True)


def test_read_ranks_the_answers_by_their_own_probabilities() -> None:
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0, 1.0, -2.0], [5.0, -5.0, -5.0, -5.0, -5.0, -4.0]])
    first, second = task_of().read(logits, Labels(tuple("abcdef")))
    assert first.labels == tuple("bdeac") and second.labels[:2] == ("a", "f")
    assert first.probabilities == pytest.approx([1 / (1 + np.exp(-x)) for x in (3, 2, 1, 0, -1)])
    assert task_of().read(logits[:, :2], Labels(("a", "b")))[0].labels == ("b", "a")


def test_large_logits_are_told_apart() -> None:
    """Their float32 sigmoids are all 1."""
    (answer,) = task_of().read(torch.tensor([[18.0, 25.0, 30.0, 20.0, 40.0, 17.5]]), Labels(tuple("abcdef")))
    assert answer.labels == tuple("ecbda") and answer.probabilities == (1.0,) * 5


def test_questions_of_a_picture_are_drawn_together() -> None:
    """Pictures whose questions are all right or all wrong: as unsure as 20 values, not as 100."""
    records = [
        record(n, image_id=n // 5, scores={"yes": 1.0}, answer_type="yes/no", question_type="is it") for n in range(100)
    ]
    said = [ranked("yes" if n // 5 % 2 else "no") for n in range(100)]
    metrics = task_of().score(records, said).metrics
    for name in ("accuracy", "accuracy/yes/no", "question/is it"):
        low, high = metrics[name].interval()
        assert (low, high) == pytest.approx((30, 70), abs=6), name  # singly: 40 to 60


def test_scores_of_all_and_by_type() -> None:
    records = [
        record(0, answers=TEN, answer_type="other", question_type="what colour"),
        record(1, answers=("yes",) * 10, answer_type="yes/no", question_type="is it"),
        record(2, answers=("3", "two", *["2"] * 8), answer_type="number", question_type="how many"),
        record(3, answers=("no", "no", *["yes"] * 8), answer_type="yes/no", question_type="is it"),
        record(4, scores={"cat": 0.6}),
    ]
    said = ["red", "Yes", "2", "no", "cat"]
    scores = task_of().score(records, [ranked(answer, "x") for answer in said])
    values = [vqa_accuracy(a, r.facts["answers"]) for a, r in zip(said, records[:4], strict=False)] + [0.6]
    assert values == pytest.approx([0.9, 0.0, 1.0, 0.6, 0.6])
    assert scores.metrics["accuracy"].values.tolist() == pytest.approx(values)
    assert scores.percents() == pytest.approx(
        {
            "accuracy": 100 * sum(values) / 5,
            "accuracy/number": 100 * values[2],
            "accuracy/other": 100 * values[0],
            "accuracy/yes/no": 50 * (values[1] + values[3]),
            "question/how many": 100 * values[2],
            "question/is it": 50 * (values[1] + values[3]),
            "question/what colour": 100 * values[0],
        }
    )
    assert next(iter(scores.metrics)) == task_of().best == task_of().tested


def test_hidden_answers_cannot_be_scored() -> None:
    records = [record(0, answers=("yes",) * 10), record(1, id=7)]
    with pytest.raises(DataError, match=r"^test.jsonl:2: holds no 'answers', so it can't be scored; --submission FILE"):
        task_of().score(records, [ranked("yes")] * 2)
    assert task_of().can_score(records[:1]) and not task_of().can_score(records[1:])
    for mixed in (records, records[::-1]):
        with pytest.raises(DataError, match=r"^test.jsonl:2: its truth is hidden, as that of 1 of the 2 examples"):
            task_of().can_score(mixed)


def test_the_submission_is_the_servers_json(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    records = [record(0, id=262148000), record(1, id=393225001)]
    task_of().write_submission(records, [ranked("down", "up"), ranked("naïve")], path)
    wanted = [{"question_id": 262148000, "answer": "down"}, {"question_id": 393225001, "answer": "naïve"}]
    assert json.loads(path.read_text(encoding="utf-8")) == wanted
    with pytest.raises(UsageError, match="the submission can't be written to"):
        task_of().write_submission(records, [ranked("a")] * 2, tmp_path / "absent" / "out.json")
    with pytest.raises(DataError, match=r"^test.jsonl:1: holds no 'id'"):
        task_of().write_submission([record(0)], [ranked("a")], path)


def test_baselines_learn_the_most_common_answer() -> None:
    truth = task_of().truth
    assert truth(example(answer="red", answers=TEN)) == "red"
    assert truth(record(0, scores={"a": 0.3, "b": 1.0})) == "b"
    assert truth(example(scores={})) is None and truth(example()) is None


@pytest.mark.parametrize("answers", [1, 2, 50])
def test_every_answer_begins_with_a_probability_of_one_in_all(answers: int) -> None:
    labels = Labels(tuple(f"answer {n}" for n in range(answers)))
    encoder = Encoder(config_of(), VOCAB)
    objective = open_task(Config()).build(encoder, labels)
    shown = [replace(sample, target=None) for sample in samples_of("pair", [4, 2, 6], config_of())]
    outputs = objective({"pair": collate_of("pair", shown, config_of())}).outputs
    torch.testing.assert_close(outputs.sigmoid(), torch.full((3, answers), 1 / max(2, answers)), rtol=0.3, atol=0)
