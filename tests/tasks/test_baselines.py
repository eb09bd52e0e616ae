import re
from collections import Counter
from itertools import pairwise
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.errors import DataError
from vlmoe_core.tasks.baselines import MOST_LABELS, Majority, TextOnly

phrases = st.lists(st.sampled_from(["what", "colour", "is", "How", "many", "dogs", "it"]), max_size=5).map(" ".join)
training = st.lists(st.tuples(phrases, st.sampled_from(["red", "blue", "2", "yes"])), min_size=1, max_size=25)


def parts(text):
    words = re.findall(r"\w+", text.lower())
    return words + list(pairwise(words))


def log_odds(text, examples):
    """Log probability of each label and the text, by the formula."""
    vocabulary = {part for seen, _ in examples for part in parts(seen)}
    scores = {}
    for label in {label for _, label in examples}:
        counts = Counter(part for seen, name in examples if name == label for part in parts(seen))
        scores[label] = log(sum(name == label for _, name in examples) / len(examples))
        for part in parts(text):
            if part in vocabulary:
                scores[label] += log((counts[part] + 1) / (counts.total() + len(vocabulary)))
    return scores


@given(training, phrases)
def test_text_only_by_the_formula(examples, text):
    texts, labels = zip(*examples, strict=True)
    predicted = TextOnly.fit(texts, labels).predict(text)
    overall = Counter(labels)
    there = Counter(label for seen, label in examples if seen == text)
    if there.total() >= 2:
        assert predicted == min(there, key=lambda label: (-there[label], -overall[label], label))
    else:
        scores = log_odds(text, examples)
        assert scores[predicted] == pytest.approx(max(scores.values()))


@given(training)
def test_majority_by_counting(examples):
    texts, labels = zip(*examples, strict=True)
    predicted = Majority.fit(texts, labels).predict("anything")
    assert predicted == sorted(labels, key=lambda label: (-labels.count(label), label))[0]


def test_a_text_seen_twice_is_looked_up():
    texts, labels = ["is it red now"] * 8, ["yes"] * 8
    once = TextOnly.fit(["is it red", *texts], ["no", *labels])
    twice = TextOnly.fit(["is it red"] * 3 + texts, ["no", "yes", "no", *labels])
    assert once.predict("is it red") == "yes"
    assert twice.predict("is it red") == "no"
    assert twice.predict("Is it red") == "yes"


def test_word_pairs_count():
    texts = ["red left of blue", "blue left of red", "red left of green", "blue left of brown"] * 2
    labels = ["true", "false", "true", "false"] * 2
    baseline = TextOnly.fit(texts, labels)
    assert baseline.predict("so red left of") == "true"
    assert baseline.predict("so blue left of") == "false"


def test_ties_go_to_the_more_frequent_then_the_alphabet():
    assert Majority.fit(["", "", "", ""], ["b", "a", "b", "a"]).predict("") == "a"
    baseline = TextOnly.fit(["x", "x", "y", "z", "z"], ["b", "a", "b", "c", "a"])
    assert baseline.predict("x") == "a"
    assert baseline.predict("z") == "a"
    assert baseline.predict("unknown words") == "a"
    assert TextOnly.fit(["x", "x", "y"], ["b", "a", "b"]).predict("x") == "b"


def test_an_empty_label_is_a_label():
    assert TextOnly.fit(["x", "x", "y", "y", "y"], ["", "", "b", "b", "b"]).predict("x") == ""


def test_rare_labels_are_known_by_lookup_alone():
    names = [f"label {i:04}" for i in range(MOST_LABELS + 1)]
    texts = [f"word{i}" for i in range(len(names))]
    baseline = TextOnly.fit([*texts, *texts[:-1], "rare", "rare"], [*names, *names[:-1], "other", "other"])
    assert baseline.predict("rare") == "other"
    assert baseline.predict("word7 it") == names[7]
    assert baseline.predict(texts[-1]) != names[-1]


def test_the_size_of_easy_vqa_takes_a_moment():
    rng = np.random.default_rng(0)
    number = rng.zipf(1.4, size=(3000, 8)) % 400
    texts = [" ".join(f"w{i}" for i in row) for row in number]
    labels = [f"l{row[0]}" for row in number]
    baseline = TextOnly.fit(texts[:2500], labels[:2500])
    right = [baseline.predict(text) == label for text, label in zip(texts[2500:], labels[2500:], strict=True)]
    assert np.mean(right) > np.mean([label == Majority.fit(texts, labels).label for label in labels[2500:]])


@pytest.mark.parametrize("kind", [Majority, TextOnly])
def test_nothing_to_fit_is_refused(kind):
    with pytest.raises(DataError, match="at least one training example"):
        kind.fit([], [])
    with pytest.raises(DataError, match="1 texts but 2 labels"):
        kind.fit(["x"], ["a", "b"])
