"""What tests of scenes share: predictors that see the text alone, and scenes to judge statements by."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.facts import Kind, statement_facts
from vlmoe_core.data.scenes.world import (
    COLOURS,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Ground,
    Scene,
    SceneObject,
    Statement,
)

Labelled = Sequence[tuple[str, str]]
"""(text, label)."""


def lookup_accuracy(train: Labelled, test: Labelled) -> float:
    """Of the commonest label of the same text; of all texts where it is new."""
    of_text: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in train:
        of_text[text][label] += 1
    common = Counter(label for _, label in train).most_common(1)[0][0]
    guesses = (of_text[text].most_common(1)[0][0] if of_text[text] else common for text, _ in test)
    return sum(guess == label for guess, (_, label) in zip(guesses, test, strict=True)) / len(test)


def naive_bayes_accuracy(train: Labelled, test: Labelled, most: int) -> float:
    """Of naive Bayes over which runs of 1 to `most` words the text has."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    labels: Counter[str] = Counter()
    for text, label in train:
        labels[label] += 1
        seen[label].update(_features(text, most))
    scale = {label: math.log(number + 2) for label, number in labels.items()}

    def score(label: str, features: set[str]) -> float:
        counts = seen[label]
        return math.log(labels[label]) + sum(math.log(counts[f] + 0.5) - scale[label] for f in features)

    right = sum(max(labels, key=lambda name: score(name, _features(text, most))) == label for text, label in test)
    return right / len(test)


def _features(text: str, most: int) -> set[str]:
    words = ["^", *text.rstrip("?").split(), "$"]
    return {" ".join(words[i : i + n]) for n in range(1, most + 1) for i in range(len(words) - n + 1)}


def kinds_of(statement: Statement) -> list[Kind]:
    """All kinds that the meaning names."""
    return [name for name in _named(statement_facts(statement)) if isinstance(name, Kind)]


def names_of(statement: Statement) -> set[str]:
    """All shapes, colours, sizes and textures that the meaning names."""
    found = [name for name in _named(statement_facts(statement))]
    words = {word for kind in kinds_of(statement) for word in (kind.shape, kind.colour, kind.size) if word is not None}
    return words | {name for name in found if isinstance(name, str)}


def scenes_about(statements: Sequence[Statement], dice: Dice) -> Iterator[Scene]:
    """Scenes without end whose objects are mostly of the kinds that the statements name."""
    kinds = list(dict.fromkeys(kind for statement in statements for kind in kinds_of(statement)))
    textures = [name for statement in statements for name in sorted(names_of(statement) & set(TEXTURES))]
    while True:
        yield _scene_about([*kinds, Kind()], dice.choice([*textures, *TEXTURES[:2]]), dice)


def _named(facts: Any) -> list[Kind | str]:
    """All kinds and textures in a meaning."""
    if isinstance(facts, list):
        return [name for item in facts for name in _named(item)]
    if not isinstance(facts, dict):
        return []
    if "says" not in facts:
        return [Kind(**facts)]
    textures = [facts["texture"]] if "texture" in facts else []
    return textures + [name for value in facts.values() for name in _named(value)]


def _scene_about(kinds: Sequence[Kind], texture: str, dice: Dice) -> Scene:
    """Up to three of the kinds, one object of each at least; other attributes as in one of the kinds, or any."""
    shown = dice.shuffled(kinds)[: dice.between(1, 3)]
    shown += [dice.choice(shown) for _ in range(dice.below(7 - len(shown)))]
    whole = [_whole(kind, dice) for kind in ((*kinds, Kind()) if dice.chance(0.6) else (Kind(),))]
    same_size = dice.choice((*SIZES, None, None, None))
    things = []
    for kind in shown:
        other = dice.choice(whole)
        size = kind.size or same_size or dice.choice(SIZES)
        centre = dice.below(SIDE), dice.below(SIDE)
        things.append(SceneObject(kind.shape or other[0], kind.colour or other[1], size, centre))
    return Scene(tuple(things), Ground(texture, "grey", 0))


def _whole(kind: Kind, dice: Dice) -> tuple[str, str]:
    return kind.shape or dice.choice(SHAPES), kind.colour or dice.choice(COLOURS)
