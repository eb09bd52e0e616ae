"""Captions and documents: many patterns, always true, no held-out pair, small vocabulary, the same everywhere."""

import hashlib
import json
import re
from itertools import pairwise, permutations
from typing import Any

import pytest

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.documents import COLOURED, make_document
from vlmoe_core.data.scenes.facts import (
    Alike,
    Both,
    Compare,
    Count,
    Every,
    Kind,
    Larger,
    OnGround,
    Placed,
    Present,
    Related,
    Untrue,
    statement_facts,
    statement_from_facts,
)
from vlmoe_core.data.scenes.language import FAMILIES, fill, make_caption
from vlmoe_core.data.scenes.words import COLOUR_WORDS, RELATION_WORDS, SHAPE_WORDS, SIZE_WORDS, plural, with_article
from vlmoe_core.data.scenes.world import HELD_OUT, OPPOSITES, Ground, Scene, SceneObject, make_scene

SCENES = [make_scene("train", 0, index) for index in range(400)]
TEMPLATES = [(family, template) for family in FAMILIES for template in family.templates]
COLOUR_OF = {word: colour for colour, words in COLOUR_WORDS.items() for word in words}
SHAPE_OF = {word: shape for shape, words in SHAPE_WORDS.items() for noun in words for word in (noun, plural(noun))}
SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
RELATION_OF = {phrase: relation for relation, phrases in RELATION_WORDS.items() for phrase in phrases}
ORDER = ["small", "medium", "large"]


def _captions(count: int = 1500) -> list[tuple[Scene, Any]]:
    return [(s, make_caption(s, Dice(f"test/{n}"))) for n in range(count) for s in [SCENES[n % len(SCENES)]]]


def _fit(kind: dict[str, str], thing: dict[str, Any]) -> bool:
    return all(thing[attribute] == value for attribute, value in kind.items())


def _beyond(a: dict[str, Any], relation: str, b: dict[str, Any]) -> bool:
    axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    along = sign * (b["centre"][axis] - a["centre"][axis])
    across = abs(b["centre"][1 - axis] - a["centre"][1 - axis])
    return along >= 112 and across <= 2 * along


def _in_place(thing: dict[str, Any], place: str) -> bool:
    x, y = (value / 1024 for value in thing["centre"])
    near = 360 / 1024
    sides = {"left": x <= near, "right": x >= 1 - near, "top": y <= near, "bottom": y >= 1 - near}
    return sides[place] if place in sides else not any(sides.values())


def _true(says: dict[str, Any], scene: dict[str, Any]) -> bool:
    """A second reading of statements, from their JSON form alone, over the JSON form of a scene."""
    things = scene["objects"]

    def number(kind: dict[str, str]) -> int:
        return sum(_fit(kind, thing) for thing in things)

    def couples() -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(x, y) for x, y in permutations(things, 2) if _fit(says["a"], x) and _fit(says["b"], y)]

    match says["says"]:
        case "present":
            groups = permutations(things, len(says["kinds"]))
            return any(all(map(_fit, says["kinds"], group)) for group in groups)
        case "count":
            return number(says["kind"]) == says["number"]
        case "compare":
            difference = number(says["a"]) - number(says["b"])
            return {"more": difference > 0, "fewer": difference < 0, "equal": difference == 0}[says["order"]]
        case "every":
            return all(_fit(says["kind"], thing) for thing in things)
        case "related":
            return any(_beyond(x, says["relation"], y) for x, y in couples())
        case "placed":
            return any(_fit(says["kind"], x) and all(_in_place(x, p) for p in says["places"]) for x in things)
        case "larger":
            return any(ORDER.index(x["size"]) > ORDER.index(y["size"]) for x, y in couples())
        case "alike":
            return any((x[says["attribute"]] == y[says["attribute"]]) is says["same"] for x, y in couples())
        case "onground":
            return bool(scene["ground"]["texture"] == says["texture"])
        case "both":
            return all(_true(part, scene) for part in says["parts"])
        case "untrue":
            return not _true(says["part"], scene)
    raise AssertionError(says)


def _named(says: Any) -> set[str]:
    """All colours, shapes and sizes in a meaning."""
    if isinstance(says, dict):
        own = {value for key, value in says.items() if key in ("colour", "shape", "size")}
        return own.union(*(_named(value) for value in says.values()))
    return set().union(*(_named(item) for item in says)) if isinstance(says, list) else set()


def test_there_are_thirty_patterns_and_more() -> None:
    assert len({template for _, template in TEMPLATES}) == len(TEMPLATES) >= 30


@pytest.mark.parametrize(("family", "template"), TEMPLATES, ids=[template for _, template in TEMPLATES])
def test_every_pattern_finds_scenes_and_speaks_the_truth(family: Any, template: str) -> None:
    found = 0
    for index, scene in enumerate(SCENES[:120]):
        caption = fill(family, template, scene, Dice(f"pattern/{index}"))
        if caption is not None:
            found += 1
            assert "{" not in caption.text and not caption.text.startswith(" ")
            assert scene.satisfies(caption.meaning), (caption, scene)
            assert _true(statement_facts(caption.meaning), scene.as_facts()), (caption, scene)
    assert found >= 3


def test_captions_are_true_by_two_readings() -> None:
    for scene, caption in _captions():
        assert scene.satisfies(caption.meaning)
        assert _true(json.loads(json.dumps(statement_facts(caption.meaning))), scene.as_facts())


def test_both_readings_agree_on_other_scenes_too() -> None:
    answers = []
    for n, (_, caption) in enumerate(_captions(1200)):
        other = SCENES[(7 * n + 1) % len(SCENES)]
        answers.append(other.satisfies(caption.meaning))
        assert answers[-1] == _true(statement_facts(caption.meaning), other.as_facts())
    assert 0.01 < sum(answers) / len(answers) < 0.5


def test_words_and_meaning_name_the_same() -> None:
    for _, caption in _captions():
        words = re.findall("[a-z]+", caption.text)
        said = {table[word] for word in words for table in (COLOUR_OF, SHAPE_OF, SIZE_OF) if word in table}
        if not isinstance(caption.meaning, Alike):  # "as large as" compares and says no size
            assert said == _named(statement_facts(caption.meaning)), caption


def test_a_relation_read_from_the_text_is_in_the_picture() -> None:
    phrase = r"an? ((?:\w+ )*?)(\w+)"
    pattern = re.compile(rf"{phrase} (?:is )?({'|'.join(sorted(RELATION_OF, key=len, reverse=True))}) {phrase}")
    found = set()
    for scene, caption in _captions(2000):
        read = pattern.fullmatch(caption.text)
        if read is None:
            continue
        relation = RELATION_OF[read[3]]
        a, b = _read_kind(read[1], read[2]), _read_kind(read[4], read[5])
        things = scene.as_facts()["objects"]
        assert any(_fit(a, x) and _fit(b, y) and _beyond(x, relation, y) for x, y in permutations(things, 2)), caption
        found.add(relation)
    assert found == {"left", "right", "above", "below"}


def _read_kind(adjectives: str, noun: str) -> dict[str, str]:
    kind = {"shape": SHAPE_OF[noun]} if noun in SHAPE_OF else {}
    for word in adjectives.split():
        kind |= {"colour": COLOUR_OF[word]} if word in COLOUR_OF else {"size": SIZE_OF[word]}
    return kind


def test_definite_relations_are_false_the_other_way_round() -> None:
    checked = 0
    for scene, caption in _captions():
        meaning = caption.meaning
        if isinstance(meaning, Related) and meaning.a.count(scene) == meaning.b.count(scene) == 1:
            assert not scene.satisfies(Related(meaning.a, OPPOSITES[meaning.relation], meaning.b))
            assert scene.satisfies(Related(meaning.b, OPPOSITES[meaning.relation], meaning.a))
            checked += 1
    assert checked > 50


def test_the_means_one_object() -> None:
    """`the red star` is said only where one object fits."""
    adjectives = "|".join([*COLOUR_OF, *SIZE_OF])
    nouns = "|".join([noun for words in SHAPE_WORDS.values() for noun in words])
    named = re.compile(
        rf"\bthe ((?:(?:{adjectives}) )*)({nouns})\b|\bthe ((?:(?:{adjectives}) )+)(shape|object|thing)\b"
    )
    checked = 0
    for scene, caption in _captions():
        for own, noun, other, general in named.findall(caption.text):
            assert Kind(**_read_kind(own or other, noun or general)).count(scene) == 1, caption
            checked += 1
    assert checked > 500


def test_statements_survive_json() -> None:
    for _, caption in _captions(400):
        assert statement_from_facts(json.loads(json.dumps(statement_facts(caption.meaning)))) == caption.meaning


def test_statements_by_hand() -> None:
    red, blue = SceneObject("star", "red", "small", (200, 500)), SceneObject("ring", "blue", "large", (700, 500))
    scene = Scene((blue, red), Ground("dotted", "grey", 0))
    a, b, anything = Kind(colour="red"), Kind(shape="ring"), Kind()
    true = [
        Present((a, b)),
        Present((anything, anything)),
        Count(a, 1),
        Count(Kind("heart"), 0),
        Compare(a, "equal", b),
        Compare(anything, "more", a),
        Every(anything),
        Related(a, "left", b),
        Placed(a, ("left",)),
        Larger(b, a),
        Alike(a, b, "colour", same=False),
        OnGround("dotted"),
        Both((Count(anything, 2), OnGround("dotted"))),
    ]
    false = [
        Present((a, a)),
        Present((anything, anything, anything)),
        Count(anything, 1),
        Compare(a, "fewer", b),
        Every(a),
        Related(a, "right", b),
        Related(a, "left", a),
        Placed(a, ("left", "top")),
        Larger(a, b),
        Alike(a, b, "size"),
        OnGround("plain"),
        Both((Count(anything, 2), OnGround("plain"))),
    ]
    for statement in true:
        assert scene.satisfies(statement) and not scene.satisfies(Untrue(statement)), statement
    for statement in false:
        assert not scene.satisfies(statement) and scene.satisfies(Untrue(statement)), statement


def test_lengths_and_vocabulary() -> None:
    captions = [caption.text for _, caption in _captions(2000)]
    documents = [" ".join(make_document(Dice(f"words/{n}"))) for n in range(2000)]
    lengths = [len(text.split()) for text in captions]
    assert min(lengths) >= 4 and max(lengths) <= 24
    assert 7 <= sum(lengths) / len(lengths) <= 12
    assert sum(6 <= length <= 20 for length in lengths) / len(lengths) > 0.9
    words = {word for text in captions + documents for word in re.findall("[a-z]+", text.lower())}
    assert 150 <= len(words) <= 350


def test_articles_and_plurals() -> None:
    assert with_article("orange star") == "an orange star"
    assert with_article("red star") == "a red star"
    assert [plural(noun) for noun in ("star", "box", "cross")] == ["stars", "boxes", "crosses"]
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption.text) for _, caption in _captions())


def test_documents_have_two_to_six_sentences() -> None:
    documents = [make_document(Dice(f"document/{n}")) for n in range(1000)]
    assert {len(document) for document in documents} == {2, 3, 4, 5, 6}
    for sentence in {sentence for document in documents for sentence in document}:
        assert sentence[0].isupper() and sentence.endswith(".") and sentence.count(".") == 1


def test_documents_tell_the_truth_about_colours_and_numbers() -> None:
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    colour_of = {thing: colour for colour, things in COLOURED.items() for thing in things}
    kinds = set()
    for n in range(1000):
        for sentence in make_document(Dice(f"truth/{n}")):
            words = sentence[0].lower() + sentence[1:-1]
            if match := re.fullmatch(r"(\w+) and (\w+) make (\w+)", words):
                assert numbers[match[1]] + numbers[match[2]] == numbers[match[3]]
            elif match := re.fullmatch(r"(\w+) without (\w+) is (\w+)", words):
                assert numbers[match[1]] - numbers[match[2]] == numbers[match[3]]
            elif match := re.fullmatch(r"(\w+) is (more|less) than (\w+)", words):
                assert (numbers[match[1]] > numbers[match[3]]) == (match[2] == "more")
            elif (match := re.fullmatch(r"(.+) is (\w+)", words)) and match[1] in colour_of:
                assert colour_of[match[1]] == match[2]
            else:
                continue
            kinds.add(match.re.pattern)
    assert len(kinds) == 4


def test_training_text_never_names_a_held_out_pair() -> None:
    texts = [caption.text for _, caption in _captions(2000)]
    texts += [" ".join(make_document(Dice(f"held/{n}"))).lower() for n in range(2000)]
    pairs = set()
    for text in texts:
        words = re.findall("[a-z]+", text)
        pairs |= {(COLOUR_OF[a], SHAPE_OF[b]) for a, b in pairwise(words) if a in COLOUR_OF and b in SHAPE_OF}
    assert len(pairs) == 90
    assert not pairs & HELD_OUT


def test_words_are_pinned() -> None:
    captions = "\n".join(caption.text for _, caption in _captions(400))
    documents = "\n".join(" ".join(make_document(Dice(f"pin/{n}"))) for n in range(200))
    assert (
        hashlib.sha256(captions.encode()).hexdigest()
        == "b145d05ecc6bb29827d716cf2d1ddee251d51db1d82fb94b5c4864c44b89c648"
    )
    assert (
        hashlib.sha256(documents.encode()).hexdigest()
        == "3884f1b833927aa47f723ca091f2af5f457a914da8029ad0a32dec64fa2732d3"
    )
