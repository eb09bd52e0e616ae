"""Questions: right by a second reading of their words, balanced, hardly told by their words alone."""

import hashlib
import re
from collections import Counter
from typing import Any

import pytest

from tests.data.scenes_support import lookup_accuracy, naive_bayes_accuracy
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.questions import QUESTION_TYPES, Question, QuestionType, make_question
from vlmoe_core.data.scenes.words import plural
from vlmoe_core.data.scenes.world import COLOURS, HELD_OUT, PLACES, SHAPES, SIZES, TEXTURES, Scene, make_scene

SCENES = [make_scene("train", 0, number) for number in range(2500)]
ASKED = [(scene, make_question(scene, Dice(f"question/{n}/{w}"))) for n, scene in enumerate(SCENES) for w in (0, 1)]
SINGULAR = {plural(shape): shape for shape in (*SHAPES, "shape", "thing")}
Thing = dict[str, Any]


def _fitting(phrase: str, things: list[Thing]) -> list[Thing]:
    """The objects that a phrase of attributes and a noun fits."""
    words = [SINGULAR.get(word, word) for word in phrase.split()]
    named = [word for word in words if word not in ("shape", "thing")]
    assert set(named) <= {*COLOURS, *SHAPES, *SIZES}, phrase
    return [thing for thing in things if set(named) <= {thing["shape"], thing["colour"], thing["size"]}]


def _the(phrase: str, things: list[Thing]) -> Thing:
    (thing,) = _fitting(phrase, things)
    return thing


def _side(x: Thing, y: Thing, relation: str) -> bool:
    """True if x is on that side of y; the other side must be out of the question."""
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    along = sign * (y["centre"][axis] - x["centre"][axis])
    assert abs(along) >= 112 and 2 * abs(along) >= abs(y["centre"][1 - axis] - x["centre"][1 - axis])
    return along > 0


def _place(thing: Thing) -> str:
    x, y = thing["centre"]
    sides = {"left": x <= 360, "right": x >= 664, "top": y <= 360, "bottom": y >= 664}
    places = [place for place, holds in sides.items() if holds] or ["middle"]
    assert len(places) == 1, "a corner is two places"
    return places[0]


def _read(text: str, scene: Scene) -> str | int | bool:
    """The answer by the words of the question and the facts of the scene alone."""
    facts = scene.as_facts()
    things, texture = facts["objects"], facts["ground"]["texture"]
    readings: list[tuple[str, Any]] = [
        (r"what colour is the (.+)|which colour does the (.+) have", lambda a: _the(a, things)["colour"]),
        (r"what shape is the (.+)|which shape is (.+)", lambda a: _the(a, things)["shape"]),
        (r"what size is the (.+)|how large is the (.+)", lambda a: _the(a, things)["size"]),
        (r"where is the (.+)|where in the picture is the (.+)", lambda a: _place(_the(a, things))),
        (r"what is the (background) like|what pattern does the (background) have", lambda _: texture),
        (r"how many (things) are in the picture", lambda a: len(_fitting(a, things))),
        (r"how many (.+) are there|how many (.+) does the picture show", lambda a: len(_fitting(a, things))),
        (r"is there an? (.+)|does the picture show an? (.+)", lambda a: bool(_fitting(a, things))),
        (r"is the background (.+)|is this an? (.+) background", lambda a: texture == a),
        (
            r"is the (.+) larger than the (.+)",
            lambda a, b: SIZES.index(_the(a, things)["size"]) > SIZES.index(_the(b, things)["size"]),
        ),
        (
            r"(?:is|does) the (.+?) (?:lie )?(left of|right of|above|below) the (.+)",
            lambda a, relation, b: _side(_the(a, things), _the(b, things), relation),
        ),
        (
            r"(?:are there|does it show) (more|fewer) (.+) than (.+)",
            lambda order, a, b: (
                (len(_fitting(a, things)) - len(_fitting(b, things))) * (1 if order == "more" else -1) > 0
            ),
        ),
        (
            r"do the (.+) and the (.+) have the same (colour|size)",
            lambda a, b, attribute: _the(a, things)[attribute] == _the(b, things)[attribute],
        ),
    ]
    for pattern, answer in readings:
        found = re.fullmatch(f"(?:{pattern})\\?", text)
        if found:
            return answer(*(group for group in found.groups() if group is not None))  # type: ignore[no-any-return]
    raise AssertionError(f"unread: {text}")


def _words(answer: str | int | bool) -> str:
    return ("yes" if answer else "no") if isinstance(answer, bool) else str(answer)


def test_answers_are_right_by_a_second_reading() -> None:
    for scene, question in ASKED:
        assert _words(_read(question.text, scene)) == question.answer, (question, scene)


@pytest.mark.parametrize("sort", QUESTION_TYPES, ids=lambda sort: sort.name)
def test_every_type_and_wording_is_asked_and_answered_in_its_words(sort: QuestionType) -> None:
    mine = [question for _, question in ASKED if question.question_type == sort.name]
    assert len(mine) > 40
    starts = {template.split("{")[0] for template in sort.templates}
    assert all(any(question.text.startswith(start) for question in mine) for start in starts)
    allowed = {
        "yes/no": {"yes", "no"},
        "number": set("0123456"),
        "other": {*COLOURS, *SHAPES, *SIZES, *PLACES, *TEXTURES},
    }
    assert {question.answer for question in mine} <= allowed[sort.answer_type]
    assert {question.answer_type for question in mine} == {sort.answer_type}


def test_answers_are_balanced() -> None:
    def largest_share(questions: list[Question]) -> float:
        answers = Counter(question.answer for question in questions)
        return answers.most_common(1)[0][1] / len(questions)

    def of(*names: str) -> list[Question]:
        return [question for _, question in ASKED if question.question_type in names]

    yes_no = [question for _, question in ASKED if question.answer_type == "yes/no"]
    assert largest_share(yes_no) < 0.53
    for name, most in {
        "colour": 0.15,
        "shape": 0.15,
        "size": 0.45,
        "place": 0.3,
        "texture": 0.25,
        "total": 0.25,
    }.items():
        assert largest_share(of(name)) < most, name
    assert largest_share(of("count")) < 0.5
    assert largest_share([question for _, question in ASKED]) < 0.3


def test_the_question_alone_tells_little() -> None:
    texts = [(question.text, question.answer) for _, question in ASKED]
    half = len(texts) * 4 // 5
    for accuracy in (
        lookup_accuracy(texts[:half], texts[half:]),
        naive_bayes_accuracy(texts[:half], texts[half:], 1),
        naive_bayes_accuracy(texts[:half], texts[half:], 2),
    ):
        assert 0.2 < accuracy < 0.4
    existence = [(q.text, q.answer) for _, q in ASKED if q.question_type in ("exists", "relation", "more", "larger")]
    half = len(existence) // 2
    assert naive_bayes_accuracy(existence[:half], existence[half:], 2) < 0.55


def test_held_out_pairs_are_named_only_beside_one() -> None:
    pairs = re.compile("(?:" + "|".join(f"{colour} {shape}s?" for colour, shape in HELD_OUT) + r")\b")
    assert not any(pairs.search(question.text) for _, question in ASKED)
    held_out = [make_scene("eval", 0, number, "heldout") for number in range(400)]
    asked = [make_question(scene, Dice(f"{number}")) for number, scene in enumerate(held_out)]
    answers = {
        question.answer for question in asked if question.question_type == "exists" and pairs.search(question.text)
    }
    assert "yes" in answers
    assert all(_words(_read(q.text, scene)) == q.answer for q, scene in zip(asked, held_out, strict=True))


def test_questions_are_pinned() -> None:
    texts = "\n".join(f"{question.text} {question.answer}" for _, question in ASKED[:400])
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "1b2fc77e8e986398f7f5f94e0d7aca6d735b9c2c247042d59d63390d4efccaea"
    )
