"""VQA accuracy by the rules of the official scorer (GT-Vision-Lab/VQA, vqaEval), and the answer list and soft targets
that VLMo and BEiT-3 train with.

Scores are fractions of one question. The scorer's own number for a set is 100 times their mean, rounded to 2 decimals;
that is left to the caller.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

from vlmoe_core.errors import DataError

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_WITH_COMMA = re.compile(r"[0-9],[0-9]")
PERIOD = re.compile(r"\.(?![0-9])")
"""A period before no digit. The scorer also means to spare periods behind a digit, but its look-behind is mistyped."""
MOST_PERIODS = 32
"""The scorer hands re.UNICODE, which is 32, to `sub` as the count."""
ARTICLES = frozenset(("a", "an", "the"))
DIGITS: Mapping[str, str] = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
STEMS: Mapping[str, str] = {
    "n't": "ai are ca could did do does had has have is might must need ought sha should was were wo would",
    "'ve": "I could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'m": "I",
    "'d've": "he I it she somebody someone something there they we who you",
    "n't've": "could had might should would",
    "": "'twas ma'am o'clock y'all 'ow's'at y'all'll y'all'd've",
}
"""The contractions that the scorer knows: stems by ending."""
ODDITIES: Mapping[str, str] = {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
"""Entries of the scorer's table that follow no rule; one of them takes a right apostrophe away."""
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Soft target by the number of people who gave an answer; more than four count as four."""


def contractions() -> dict[str, str]:
    """The scorer's 120 entries: each contraction by each way to forget exactly one of its apostrophes.

    The scorer looks up lower-case words, so that the entries with a capital I never apply.
    """
    forms = [stem + ending for ending, stems in STEMS.items() for stem in stems.split()]
    without_one = {
        form[:place] + form[place + 1 :]: form
        for form in forms
        for place, character in enumerate(form)
        if character == "'"
    }
    return {**without_one, **ODDITIES}


CONTRACTIONS: Mapping[str, str] = contractions()


def clean(answer: str) -> str:
    """The answer as the scorer always takes it: line ends and tabs are spaces, none at either end."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """The answer without punctuation, articles, number words and forgotten apostrophes, in lower case.

    This is what the scorer does to both sides where people disagree, and what names the classes of an answer list
    (`normalize_word` of VLMo and BEiT-3; the commas that it takes away at the end are gone by then).
    """
    words = (DIGITS.get(word, word) for word in _without_punctuation(answer).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(answer: str) -> str:
    """Each mark becomes nothing, or a space; which one depends on the answer as it was written."""
    has_digits_with_comma = DIGITS_WITH_COMMA.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in answer or f" {mark}" in answer
            text = text.replace(mark, "" if has_digits_with_comma or beside_space else " ")
    return PERIOD.sub("", text, count=MOST_PERIODS)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score of one question in 0..1: mean over its people of min(1, others who gave the predicted answer / 3).

    `answers` are the human answers as written, usually 10. Where all of them are the same, neither side is normalised,
    so that "Yes" then misses ten times "yes". DataError if there are no answers.
    """
    if not answers:
        raise DataError("a question without human answers can't be scored: leave it out")
    cleaned, predicted = [clean(answer) for answer in answers], clean(prediction)
    if len(set(cleaned)) > 1:
        cleaned, predicted = [normalise(answer) for answer in cleaned], normalise(predicted)
    people, matching = len(cleaned), cleaned.count(predicted)
    # In thirds, so that the one division below rounds once: a person who matches leaves one match less to the others.
    thirds = matching * min(3, matching - 1) + (people - matching) * min(3, matching)
    return thirds / (3 * people)


def soft_targets(answers: Sequence[str], classes: Collection[str]) -> dict[str, float]:
    """Training target of a question: score by answer, for the answers that are classes; empty if none is.

    Answers count as written, though the classes are normalised: so do VLMo and BEiT-3. `classes` is the answer list,
    or a mapping from it.
    """
    counts = Counter(answer for answer in answers if answer in classes)
    return {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in counts.items()}


def answer_classes(answers: Iterable[str], min_count: int = 9) -> tuple[str, ...]:
    """The answer list of VLMo and BEiT-3: normalised answers that occur at least `min_count` times.

    `answers` are the `multiple_choice_answer` of all questions, train before val. The classes are in the order of first
    appearance; VQA v2 gives 3,129.
    """
    counts = Counter(normalise(answer) for answer in answers)
    return tuple(answer for answer, count in counts.items() if count >= min_count)
