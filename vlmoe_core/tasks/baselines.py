"""Predictors that never see a picture: what a task's number must beat.

Majority for every task; TextOnly as question-only (VQA), statement-only (NLVR2) and hypothesis-only (inference).
Both are fitted on training examples: `fit(texts, labels)`, then `predict(text)`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.errors import DataError

WORD = re.compile(r"\w+")
MOST_LABELS = 1000
"""Labels that the naive Bayes model chooses from, the most frequent ones."""
SEEN = 2
"""A text is looked up if it was seen so often in training."""


class Baseline(Protocol):
    """Names a label for a text."""

    def predict(self, text: str) -> str:
        """The label."""


@dataclass(frozen=True)
class Majority:
    """Always the most frequent label of training; the first in the alphabet among equals."""

    label: str

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[str]) -> Self:
        """The most frequent of the labels, one a text; DataError if there is none."""
        return cls(_ranked(texts, labels)[0])

    def predict(self, text: str) -> str:
        """The label, whatever the text."""
        return self.label


@dataclass(frozen=True)
class TextOnly:
    """The best label given the text alone.

    A text that training had at least twice gets the label it had most often there. Any other text gets the answer of
    multinomial naive Bayes over its words and pairs of neighbouring words, with add-one smoothing, among the 1,000 most
    frequent labels. Among equals the label that is more frequent in training, then the first in the alphabet.
    """

    seen: Mapping[str, str]
    bayes: "NaiveBayes"

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[str]) -> Self:
        """From the texts of training with one label each; DataError if there is none."""
        ranked = _ranked(texts, labels)
        return cls(_looked_up(texts, labels, ranked), NaiveBayes.fit(texts, labels, ranked[:MOST_LABELS]))

    def predict(self, text: str) -> str:
        """The label of the text."""
        return self.seen[text] if text in self.seen else self.bayes.predict(text)


@dataclass(frozen=True)
class NaiveBayes:
    """Multinomial naive Bayes; C labels, F features. Only counts above 0 are stored, feature by feature."""

    labels: Sequence[str]
    """The C labels."""
    prior_C: NDArray[np.float64]
    """Log of the number of training texts of each label."""
    total_C: NDArray[np.float64]
    """Log of the number of features in the texts of each label, plus F."""
    features: Mapping[str, int]
    """Number of each feature."""
    starts: NDArray[np.int64]
    """(F + 1,): where each feature's entries start in the two below."""
    label: NDArray[np.int64]
    """Label of each entry, a feature with a label that it occurs with."""
    weight: NDArray[np.float64]
    """Log of 1 + how often it does."""

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[str], chosen: Sequence[str]) -> Self:
        """From the texts of training whose label is chosen, one label a text."""
        number = {label: index for index, label in enumerate(chosen)}
        features: dict[str, int] = {}
        pairs: list[int] = []  # one number for a feature with a label
        texts_C = np.zeros(len(chosen))
        for text, name in zip(texts, labels, strict=True):
            if name in number:
                label = number[name]
                texts_C[label] += 1
                found = features_of(text)
                pairs += [features.setdefault(feature, len(features)) * len(chosen) + label for feature in found]
        pair, count = np.unique(np.array(pairs, dtype=np.int64), return_counts=True)
        feature, label_of = np.divmod(pair, len(chosen))
        starts = np.searchsorted(feature, np.arange(len(features) + 1))
        total_C = np.bincount(label_of, weights=count, minlength=len(chosen)) + max(1, len(features))
        return cls(chosen, np.log(texts_C), np.log(total_C), features, starts, label_of, np.log1p(count))

    def predict(self, text: str) -> str:
        """The most probable label, the first of `labels` among equals; features that training lacks don't count."""
        known = [self.features[feature] for feature in features_of(text) if feature in self.features]
        score_C = self.prior_C - len(known) * self.total_C
        for feature in known:
            entries = slice(self.starts[feature], self.starts[feature + 1])
            score_C[self.label[entries]] += self.weight[entries]  # a label occurs once in the entries
        return self.labels[int(score_C.argmax())]


def features_of(text: str) -> list[str]:
    """Words of the text in lower case, and pairs of neighbours, each as often as it occurs."""
    words = WORD.findall(text.lower())
    return words + [f"{first} {second}" for first, second in pairwise(words)]


def _ranked(texts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The labels, the most frequent first, then by the alphabet."""
    if not labels:
        raise DataError("a baseline needs at least one training example with a label")
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts but {len(labels)} labels: give one for each")
    return _by_count(labels)


def _by_count(labels: Iterable[str]) -> list[str]:
    counts = Counter(labels)
    return sorted(counts, key=lambda label: (-counts[label], label))


def _looked_up(texts: Sequence[str], labels: Sequence[str], ranked: Sequence[str]) -> dict[str, str]:
    """Label of each text that occurs often enough: its most frequent one, the first in `ranked` among equals."""
    place = {label: index for index, label in enumerate(ranked)}
    labels_of: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text, label in zip(texts, labels, strict=True):
        labels_of[text][label] += 1
    return {
        text: min(counts, key=lambda label: (-counts[label], place[label]))
        for text, counts in labels_of.items()
        if counts.total() >= SEEN
    }
