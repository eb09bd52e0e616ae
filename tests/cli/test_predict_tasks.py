"""`vlmoe predict vqa`, `nlvr2`, `classification`, `nli` and `retrieval` on own pictures and texts."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.tasks_support import Typed, rows_of, vlmoe
from tests.train.tasks_support import TASKS

COLOURS = ("red", "blue", "lime")


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of other sizes than the model's, beside a file that is none."""
    folder = tmp_path_factory.mktemp("album")
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (30 + number, 20), colour).save(folder / f"{colour}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(done: Typed) -> dict[str, list[tuple[str, float]]]:
    """Answers with probabilities by example, the best first."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in done.data["answers"]:
        found.setdefault(row["example"], []).append((row["answer"], row["probability"]))
    return found


ONE = {
    "vqa": ("--image", "red.png", "--question", "what colour is the circle?"),
    "nlvr2": ("--image", "red.png", "--image", "blue.png", "--statement", "both show a star"),
    "classification": ("--image", "red.png"),
    "nli": ("--premise", "all shapes are red", "--hypothesis", "no shape is blue"),
}


def placed(album: Path, *arguments: str) -> list[str]:
    """The arguments, pictures in the album."""
    return [str(album / word) if word.endswith((".png", ".txt")) else word for word in arguments]


@pytest.mark.parametrize("task", list(ONE))
def test_one_example(work: Path, album: Path, task: str) -> None:
    done = vlmoe(work, "predict", task, *placed(album, *ONE[task]), "--json")
    assert done.data["task"] == task
    assert done.data["model"] == f"runs/{task}/checkpoints/step-00000004"
    assert f"model runs/{task}/checkpoints/step-00000004, step 4" in done.err
    ((example, ranked),) = answers(done).items()
    assert example == ("premise" if task == "nli" else str(album / "red.png"))
    probabilities = [probability for _, probability in ranked]
    assert probabilities == sorted(probabilities, reverse=True) and len(ranked) == {"nlvr2": 2}.get(task, 3)
    if task in ("nlvr2", "nli"):
        assert sum(probabilities) == pytest.approx(1)
        assert {label for label, _ in ranked} == (
            {"True", "False"} if task == "nlvr2" else {"entailment", "neutral", "contradiction"}
        )


@pytest.mark.parametrize("task", list(ONE))
def test_a_table_for_people(work: Path, album: Path, task: str) -> None:
    shown = vlmoe(work, "predict", task, *placed(album, *ONE[task]))
    told = vlmoe(work, "predict", task, *placed(album, *ONE[task]), "--json")
    table = list(rows_of(shown.out))
    assert table[0] == ["example", "answer", "probability"]
    expected = [[row["example"], row["answer"], f"{row['probability']:.4g}"] for row in told.data["answers"]]
    assert table[1:] == expected


def test_a_folder_of_pictures_in_order(work: Path, album: Path) -> None:
    done = vlmoe(work, "predict", "classification", "--image", str(album), "--top", "1", "--json")
    assert [Path(name).name for name in answers(done)] == ["blue.png", "lime.png", "red.png"]
    assert all(len(ranked) == 1 for ranked in answers(done).values())
    asked = ("--question", "is there a star?", "--top", "5", "--json")
    questions = answers(vlmoe(work, "predict", "vqa", "--image", str(album), *asked))
    assert len(questions) == 3 and all(len(ranked) == 5 for ranked in questions.values())


def test_json_lines_of_questions(work: Path, album: Path) -> None:
    rows = [{"image": f"{c}.png", "question": "what colour is the circle?"} for c in COLOURS]
    done = vlmoe(work, "predict", "vqa", "--input", str(write_lines(album / "ask.jsonl", rows)), "--json")
    assert list(answers(done)) == ["ask.jsonl:1", "ask.jsonl:2", "ask.jsonl:3"]
    alone = vlmoe(work, "predict", "vqa", *placed(album, *ONE["vqa"]), "--json")
    (expected,) = answers(alone).values()
    found = answers(done)["ask.jsonl:1"]
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=1e-6)


def test_json_lines_of_the_other_tasks(work: Path, album: Path) -> None:
    rows = {
        "nlvr2": {"images": ["red.png", "blue.png"], "statement": "both show a star"},
        "classification": {"image": "red.png"},
        "nli": {"premise": "all shapes are red", "hypothesis": "no shape is blue"},
    }
    for task, row in rows.items():
        file = write_lines(album / f"{task}.jsonl", [row, row])
        done = vlmoe(work, "predict", task, "--input", str(file), "--json")
        alone = vlmoe(work, "predict", task, *placed(album, *ONE[task]), "--json")
        (expected,) = answers(alone).values()
        for ranked in answers(done).values():
            assert [label for label, _ in ranked] == [label for label, _ in expected]
            assert [p for _, p in ranked] == pytest.approx([p for _, p in expected], abs=1e-6)


def test_more_lines_than_a_batch(work: Path, album: Path) -> None:
    rows = [{"premise": f"there are {n % 5} circles", "hypothesis": "there is a star"} for n in range(70)]
    found = answers(vlmoe(work, "predict", "nli", "--input", str(write_lines(album / "m.jsonl", rows)), "--json"))
    assert list(found) == [f"m.jsonl:{n}" for n in range(1, 71)]
    for n in range(70):
        assert [p for _, p in found[f"m.jsonl:{n + 1}"]] == pytest.approx(
            [p for _, p in found[f"m.jsonl:{n % 5 + 1}"]], abs=1e-6
        )


def test_pairs_of_pictures_and_captions(work: Path, album: Path) -> None:
    texts = ("--text", "a red circle", "--text", "a blue square")
    done = vlmoe(work, "predict", "retrieval", "--image", str(album), *texts, "--json")
    matches = done.data["matches"]
    assert len({(one["image"], one["text"]) for one in matches}) == 6
    assert [one["similarity"] for one in matches] == sorted((one["similarity"] for one in matches), reverse=True)
    assert all(-1 <= one["similarity"] <= 1 and 0 < one["match"] < 1 for one in matches)
    best = vlmoe(work, "predict", "retrieval", "--image", str(album), *texts, "--top", "2", "--json").data["matches"]
    assert best == matches[:2]
    one = vlmoe(
        work, "predict", "retrieval", "--image", str(album / "red.png"), "--text", "a red circle", "--json"
    ).data["matches"]
    (expected,) = [m for m in matches if m["image"].endswith("red.png") and m["text"] == "a red circle"]
    assert one[0]["similarity"] == pytest.approx(expected["similarity"], abs=1e-6)
    assert one[0]["match"] == pytest.approx(expected["match"], abs=1e-6)


BROKEN: list[tuple[str, dict[str, Any] | str, str]] = [
    ("vqa", "{no json", r"broken.jsonl:2"),
    ("vqa", {"image": "none.png", "question": "a?"}, "broken.jsonl:2: there is no file"),
    ("vqa", {"image": "notes.txt", "question": "a?"}, "broken.jsonl:2: "),
    ("vqa", {"image": "../red.png", "question": "a?"}, "broken.jsonl:2: '../red.png' leads out of"),
    ("vqa", {"image": 7, "question": "a?"}, "broken.jsonl:2: 'image' must name a picture"),
    ("vqa", {"image": "red.png"}, "broken.jsonl:2: has no text, which the pair stream needs"),
    ("vqa", {"image": "red.png", "question": ""}, "broken.jsonl:2: "),
    ("vqa", {"image": "red.png", "question": 5}, "broken.jsonl:2: "),
    ("vqa", {"question": "a?"}, "broken.jsonl:2: has 0 pictures, the model takes 1"),
    ("classification", {"images": []}, "broken.jsonl:2: has 0 pictures, the model takes 1"),
    ("nlvr2", {"images": ["red.png"], "statement": "a"}, "broken.jsonl:2: has 1 pictures, the model takes 2"),
    ("nlvr2", {"images": "red.png", "statement": "a"}, "broken.jsonl:2: 'image' must name a picture, and 'images'"),
    ("nli", {"premise": "a"}, "broken.jsonl:2: has no hypothesis"),
    ("nli", {"hypothesis": "a"}, "broken.jsonl:2: has no text, which the text stream needs"),
]
GOOD: dict[str, dict[str, Any]] = {
    "vqa": {"image": "red.png", "question": "a?"},
    "classification": {"image": "red.png"},
    "nlvr2": {"images": ["red.png", "blue.png", "lime.png"], "statement": "a"},
    "nli": {"premise": "a", "hypothesis": "b"},
}


@pytest.mark.parametrize(("task", "row", "message"), BROKEN)
def test_a_line_that_is_broken_is_named(
    work: Path, album: Path, task: str, row: dict[str, Any] | str, message: str
) -> None:
    good = GOOD[task] if task != "nlvr2" else GOOD["nlvr2"] | {"images": ["red.png", "blue.png"]}
    file = album / "broken.jsonl"
    file.write_text(f"{json.dumps(good)}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    done = vlmoe(work, "predict", task, "--input", str(file))
    assert done.code == 1 and message in done.message


def test_numbers_of_pictures_that_only_add_up_are_refused(work: Path, album: Path) -> None:
    """Three pictures and one make two a line: the answers would be about the wrong ones."""
    rows = [GOOD["nlvr2"], {"images": ["red.png"], "statement": "a"}]
    done = vlmoe(work, "predict", "nlvr2", "--input", str(write_lines(album / "odd.jsonl", rows)))
    assert done.code == 1 and "odd.jsonl:1: has 3 pictures, the model takes 2" in done.message


def test_pairs_of_the_pictures_and_captions_of_a_file(work: Path, album: Path) -> None:
    rows = [{"image": "red.png", "text": "a red circle"}, {"text": "a blue square"}, {"image": "blue.png"}]
    file = write_lines(album / "pairs.jsonl", rows)
    read = vlmoe(work, "predict", "retrieval", "--input", str(file), "--json").data["matches"]
    images = ("--image", str(album / "red.png"), "--image", str(album / "blue.png"))
    texts = ("--text", "a red circle", "--text", "a blue square")
    typed = vlmoe(work, "predict", "retrieval", *images, *texts, "--json").data["matches"]
    assert len(read) == 4 and {one["image"] for one in read} == {"pairs.jsonl:1", "pairs.jsonl:3"}
    assert [(one["text"], one["similarity"]) for one in read] == [(one["text"], one["similarity"]) for one in typed]
    file = write_lines(album / "texts.jsonl", [{"text": "a blue square"}])
    assert "has an 'image'" in vlmoe(work, "predict", "retrieval", "--input", str(file)).message


@pytest.mark.parametrize(
    ("typed", "code", "message"),
    [
        (("vqa", "--image", "red.png"), 2, "--question is missing: give it, or --input with a file of examples"),
        (("vqa", "--question", "a?"), 2, "no pictures in nothing; give files or folders"),
        (("vqa", "--image", "none.png", "--question", "a?"), 1, "none.png"),
        (("vqa", "--image", "notes.txt", "--question", "a?"), 1, "notes.txt: "),
        (("nlvr2", "--image", "red.png", "--statement", "a"), 1, "red.png: has 1 pictures, the model takes 2"),
        (("nlvr2", "--image", "red.png", "--image", "blue.png"), 2, "--statement is missing"),
        (("classification",), 2, "no pictures in nothing"),
        (("nli", "--premise", "a"), 2, "--hypothesis is missing"),
        (("nli", "--hypothesis", "a"), 2, "--premise is missing"),
        (("retrieval", "--image", "red.png"), 2, "nothing to look for: give one or more --text"),
        (("retrieval", "--text", "a"), 2, "no pictures in nothing"),
        (("nli", "--input", "none.jsonl"), 2, "--input none.jsonl: there is no such file"),
        (("nli", "--model", "runs/vqa", "--premise", "a", "--hypothesis", "b"), 2, "was finetuned on vqa"),
    ],
)
def test_what_is_missing_is_named(work: Path, album: Path, typed: tuple[str, ...], code: int, message: str) -> None:
    done = vlmoe(work, "predict", *placed(album, *typed))
    assert done.code == code and message in done.message


@pytest.mark.parametrize("task", TASKS)
def test_without_a_model_the_command_that_makes_one_is_named(tmp_path: Path, album: Path, task: str) -> None:
    words = ONE.get(task, ("--image", "red.png", "--text", "a"))
    done = vlmoe(tmp_path, "predict", task, *placed(album, *words))
    assert done.code == 2 and f"make one with 'vlmoe finetune quickstart/{task}'" in done.message


def test_an_empty_folder_has_no_pictures(work: Path, tmp_path: Path) -> None:
    done = vlmoe(work, "predict", "classification", "--image", str(tmp_path))
    assert done.code == 2 and f"no pictures in {tmp_path}" in done.message
