"""Premises and hypotheses: labels true by model checking, hypotheses that tell nothing, the same everywhere."""

import hashlib
from collections import Counter
from itertools import islice

import pytest

from tests.data.scenes_support import kinds_of, lookup_accuracy, naive_bayes_accuracy, names_of, scenes_about
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.entailment import FORMS, LABELS, Entailment, Form, Label, Maker, fill, make_entailment
from vlmoe_core.data.scenes.facts import Kind
from vlmoe_core.data.scenes.topics import clash, loose, make_topic, narrow, narrower, wide
from vlmoe_core.data.scenes.words import COLOUR_WORDS, SIZE_WORDS, TEXTURE_WORDS
from vlmoe_core.data.scenes.world import HELD_OUT, make_scene

CASES = [
    pytest.param(form, label, maker, id=f"{form.name}-{label}-{number}")
    for form in FORMS
    for label in LABELS
    for number, maker in enumerate(form.premises[label])
]
ITEMS = [make_entailment(Dice(f"item/{number}")) for number in range(5000)]


def _outcomes(item: Entailment, dice: Dice) -> Counter[bool]:
    """How often the hypothesis is true and false in scenes in which the premise is true."""
    premise, hypothesis = item.premise.meaning, item.hypothesis.meaning
    outcomes: Counter[bool] = Counter()
    for scene in islice(scenes_about([premise, hypothesis], dice), 4000):
        if premise.holds(scene):
            outcomes[hypothesis.holds(scene)] += 1
            if len(outcomes) == 2 or outcomes.total() == 30:
                break
    return outcomes


@pytest.mark.parametrize(("form", "label", "maker"), CASES)
def test_the_label_is_what_all_scenes_say(form: Form, label: Label, maker: Maker) -> None:
    for number in range(2):
        dice = Dice(f"{form.name}/{label}/{number}")
        item = fill(form, label, maker, make_topic(dice), dice)
        outcomes = _outcomes(item, dice)
        expected = {"entailment": {True}, "contradiction": {False}, "neutral": {True, False}}[label]
        assert set(outcomes) == expected, item


def test_labels_are_even_and_forms_too() -> None:
    labels = Counter(item.label for item in ITEMS)
    assert min(labels.values()) > 0.3 * len(ITEMS)
    words = Counter(word for item in ITEMS for word in set(item.hypothesis.text.split()))
    assert all(words[word] > 50 for word in ("there", "exactly", "no", "all", "the", "more", "background", "than"))


def test_the_hypothesis_alone_tells_nothing() -> None:
    texts = [(item.hypothesis.text, item.label) for item in ITEMS]
    half = len(texts) // 2
    assert lookup_accuracy(texts[:half], texts[half:]) < 0.4
    assert naive_bayes_accuracy(texts[:half], texts[half:], 2) < 0.4


def test_the_premise_alone_tells_little() -> None:
    texts = [(item.premise.text, item.label) for item in ITEMS]
    half = len(texts) // 2
    assert naive_bayes_accuracy(texts[:half], texts[half:], 2) < 0.55


def test_no_sentence_names_a_held_out_pair() -> None:
    for item in ITEMS:
        for statement in (item.premise.meaning, item.hypothesis.meaning):
            for kind in kinds_of(statement):
                assert (kind.colour, kind.shape) not in HELD_OUT, item


def test_meaning_and_words_agree() -> None:
    """Numbers, textures, colours and sizes of the meaning are those of the sentence."""
    for item in ITEMS[:1000]:
        for sentence in (item.premise, item.hypothesis):
            if "as large as" in sentence.text:
                continue
            words = set(sentence.text.split())
            for values in (COLOUR_WORDS, SIZE_WORDS, TEXTURE_WORDS):
                said = {value for value, synonyms in values.items() if words & set(synonyms)}
                assert said == names_of(sentence.meaning) & set(values), sentence


def test_kinds_include_exclude_or_leave_open() -> None:
    things = [thing for number in range(60) for thing in make_scene("train", 0, number).objects]
    for number in range(200):
        dice = Dice(f"kinds/{number}")
        topic = make_topic(dice)
        narrow_a, wide_a, clash_a, loose_a = (change(topic.a, dice) for change in (narrow, wide, clash, loose))
        assert narrower(topic.a, dice) != topic.a
        fits = [thing for thing in things if topic.a.fits(thing)]
        assert all(topic.a.fits(thing) for thing in things if narrow_a.fits(thing))
        assert all(wide_a.fits(thing) for thing in fits)
        assert not any(kind.fits(thing) for thing in fits for kind in (clash_a, topic.b, topic.c))
        assert not any(topic.b.fits(thing) and topic.c.fits(thing) for thing in things)
        assert any(getattr(topic.a, name) and not getattr(loose_a, name) for name in ("shape", "colour", "size"))
        assert loose_a != Kind()


def test_texts_are_pinned() -> None:
    texts = "\n".join(f"{item.premise.text}|{item.hypothesis.text}|{item.label}" for item in ITEMS[:300])
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "c62c9dc1b0d984789e17770b87d49f0b9869e6a9a38090dba3d05e1180334c9e"
    )
