"""The VQA metric against a second version of its rules, written from their description alone."""

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.errors import DataError
from vlmoe_core.tasks.metrics.vqa import (
    CONTRACTIONS,
    answer_classes,
    clean,
    normalise,
    soft_targets,
    vqa_accuracy,
)

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "vqa_v2"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = ["none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ONE_APOSTROPHE = """
'twas I'm I've ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
WITH_HAVE = {
    "'d": ["he", "I", "it", "she", "somebody", "someone", "something", "there", "they", "we", "who", "you"],
    "n't": ["could", "had", "might", "should", "would"],
}


def contraction_table():
    table = {form.replace("'", ""): form for form in ONE_APOSTROPHE.split()}
    for middle, stems in WITH_HAVE.items():
        for stem in stems:
            table[stem + middle.replace("'", "") + "'ve"] = f"{stem}{middle}'ve"
            table[stem + middle + "ve"] = f"{stem}{middle}'ve"
    table |= dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], "'ow's'at")
    table |= dict.fromkeys(["yall'll", "y'allll"], "y'all'll")
    table |= dict.fromkeys(["yall'd've", "y'alld've", "y'all'dve"], "y'all'd've")
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


TABLE = contraction_table()


def without_marks(text):
    """Position by position in place of a replacement a mark."""
    numerals = any(
        text[i] == "," and text[i - 1 : i] in set("0123456789") and text[i + 1 : i + 2] in set("0123456789")
        for i in range(len(text))
    )
    spaced = {a if b == " " else b for a, b in pairwise(text) if " " in (a, b)}
    characters = [c if c not in MARKS else "" if numerals or c in spaced else " " for c in text]
    return "".join(characters)


def without_periods(text):
    kept, removed = "", 0
    for i, character in enumerate(text):
        followed = text[i + 1 : i + 2] in tuple("0123456789")
        if character == "." and not followed and removed < 32:
            removed += 1
        else:
            kept += character
    return kept


def plain(text):
    words = []
    for word in without_periods(without_marks(text)).lower().split():
        number = [i for i, names in enumerate(NUMBERS) if word in names.split()]
        words.append(str(number[0]) if number else word)
    return " ".join(TABLE.get(word, word) for word in words if word not in ("a", "an", "the"))


def score(prediction, answers):
    def bare(text):
        return " ".join(text.replace("\t", "\n").split("\n")).strip()

    answers, prediction = list(map(bare, answers)), bare(prediction)
    if any(answer != answers[0] for answer in answers):
        answers, prediction = list(map(plain, answers)), plain(prediction)
    total = Fraction(0)
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        total += min(Fraction(1), Fraction(sum(other == prediction for other in others), 3))
    return total / len(answers)


PIECES = [*MARKS, *"  ...,,013aAxé'\n\t", "the", "An", "one ", "none", "Ten", "yes", "Yes", "dont", "u.s.", "3,000"]
PIECES += list(TABLE)[::7] + list(TABLE.values())[::11]
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@given(texts | st.text('a-"( 3,.', max_size=12))
def test_normalise_follows_the_rules(text):
    assert normalise(text) == plain(text)


@given(st.lists(texts, min_size=1, max_size=3), st.data())
def test_accuracy_follows_the_rules(pool, data):
    answers = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=10))
    prediction = data.draw(st.sampled_from([*pool, pool[0].upper(), f"the {pool[0]}\n"]))
    assert vqa_accuracy(prediction, answers) == float(score(prediction, answers))


@pytest.mark.parametrize(("people", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (9, 1)])
def test_score_by_number_of_people(people, expected):
    answers = ["red"] * people + [f"other {i}" for i in range(10 - people)]
    assert vqa_accuracy("red", answers) == expected
    assert soft_targets(answers, {"red"}).get("red", 0) == expected


def test_the_contraction_table_is_the_published_one():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS == TABLE


@pytest.mark.parametrize("form", ["don't", "y'all'd've", "couldn't've", "'ow's'at", "o'clock", "who'd've"])
def test_one_forgotten_apostrophe_is_put_back(form):
    places = [i for i, c in enumerate(form) if c == "'"]
    assert {normalise(form[:i] + form[i + 1 :]) for i in places} == {form}
    if len(places) > 1:
        bare = form.replace("'", "")
        assert normalise(bare) == bare


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("dont", "don't"),
        ("DONT", "don't"),
        ("let's", "let's"),
        ("lets", "lets"),
        ("she's", "she's"),
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("Im", "im"),
        ("i'dve", "i'dve"),
        ("U.S.", "us"),
        ("1.5", "1.5"),
        ("5.", "5"),
        ("5.a", "5a"),
        (".5", ".5"),
        ("...", ""),
        ("3,000", "3000"),
        ("3, 000", "3 000"),
        ("a,b", "b"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("red ,blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("t-shirt -red", "tshirt red"),
        ("t-shirt- red", "tshirt red"),
        ("t-shirt-(red", "t shirt red"),
        ("3,000 t-shirt", "3000 tshirt"),
        ("what?!", "what"),
        ("a man and the dog", "man and dog"),
        ("An", ""),
        ("None", "0"),
        ("zero", "0"),
        ("ten a one", "10 1"),
        ("eleven", "eleven"),
        ("  two\n  dogs ", "2 dogs"),
        ("rock'n'roll: yes", "rock'n'roll: yes"),
    ],
)
def test_normalise_by_hand(written, expected):
    assert normalise(written) == expected


def test_no_more_than_32_periods_go():
    assert normalise("." * 40 + "x") == "." * 8 + "x"


def test_clean_keeps_the_words():
    assert clean("\n The\tDog.\n") == "The Dog."
    assert clean("a \t b") == "a   b"


def test_identical_answers_are_not_normalised():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("yes\n", ["yes\t"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["Yes"]) == 1


def test_answers_that_differ_by_ends_alone_are_identical():
    assert vqa_accuracy("The yes", ["yes", "yes ", "\nyes"] * 3) == 0


def test_other_numbers_of_people():
    assert vqa_accuracy("red", ["red"]) == 0
    assert vqa_accuracy("red", ["red", "Blue"]) == pytest.approx(1 / 6)
    with pytest.raises(DataError, match="without human answers"):
        vqa_accuracy("red", [])


def test_soft_targets_compare_what_people_wrote():
    answers = ["yes"] * 5 + ["Yes"] * 2 + ["no"] * 2 + ["maybe"]
    assert soft_targets(answers, {"yes": 0, "no": 1, "red": 2}) == {"yes": 1.0, "no": 0.6}
    assert soft_targets(answers, ("yes", "maybe")) == {"yes": 1.0, "maybe": 0.3}
    assert soft_targets(answers, ["red"]) == {}


@given(st.lists(st.sampled_from(["yes", "no", "2", "red"]), min_size=10, max_size=10))
def test_soft_targets_are_the_accuracy_of_plain_answers(answers):
    targets = soft_targets(answers, {"yes", "no", "2"})
    assert targets.keys() == set(answers) - {"red"}
    assert all(value == vqa_accuracy(answer, answers) for answer, value in targets.items())


def test_answer_classes_in_order_of_first_appearance():
    answers = ["Two", "red", "a red", "blue", "2", "red.", "none", "blue"]
    assert answer_classes(answers, min_count=2) == ("2", "red", "blue")
    assert answer_classes(answers, min_count=3) == ("red",)
    assert answer_classes(iter(["yes"] * 9 + ["no"] * 8)) == ("yes",)


@given(st.lists(texts, max_size=30), st.integers(1, 4))
def test_answer_classes_by_counting(answers, least):
    counts = Counter(map(plain, answers))
    first = list(dict.fromkeys(map(plain, answers)))
    assert answer_classes(answers, least) == tuple(answer for answer in first if counts[answer] >= least)


@needs_shared
def test_published_questions():
    annotations = json.loads((SHARED / "v2_mscoco_train2014_annotations.json").read_text("utf-8"))["annotations"]
    classes = json.loads((SHARED / "trainval_ans2label.json").read_text("utf-8"))
    people = [[person["answer"] for person in entry["answers"]] for entry in annotations]
    assert [len(answers) for answers in people] == [10, 10, 10]
    for answers, entry in zip(people, annotations, strict=True):
        for prediction in (*answers, entry["multiple_choice_answer"], "elephant"):
            assert vqa_accuracy(prediction, answers) == float(score(prediction, answers))
        assert vqa_accuracy(entry["multiple_choice_answer"], answers) > 0
        expected = {a: min(1, 0.3 * n) for a, n in Counter(answers).items() if a in classes}
        assert soft_targets(answers, classes) == pytest.approx(expected)


@needs_shared
def test_the_published_classes_are_normalised():
    classes = json.loads((SHARED / "trainval_label2ans.json").read_text("utf-8"))
    assert answer_classes(classes, min_count=1) == tuple(classes)
    assert len(classes) == 3129
