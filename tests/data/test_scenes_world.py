"""The world: how rich it is, that it is decided by its number alone, and what can be asked of it."""

import json
from itertools import permutations

import numpy as np
import pytest

from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.draw import SAMPLES, object_mask
from vlmoe_core.data.scenes.world import (
    COLOURS,
    HELD_OUT,
    OPPOSITES,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Ground,
    Scene,
    SceneObject,
    make_scene,
    relation_holds,
    relations,
    scene_from_facts,
)

SCENES = [make_scene("train", 0, index) for index in range(600)]


def _thing(x: int, y: int, shape: str = "circle", colour: str = "red", size: str = "small") -> SceneObject:
    return SceneObject(shape, colour, size, (x, y))


def test_is_as_rich_as_promised() -> None:
    things = [thing for scene in SCENES for thing in scene.objects]
    assert len({thing.shape for thing in things}) == len(SHAPES) >= 8
    assert len({thing.colour for thing in things}) == len(COLOURS) >= 10
    assert len({thing.size for thing in things}) == len(SIZES) == 3
    assert {len(scene.objects) for scene in SCENES} == {1, 2, 3, 4, 5, 6}
    assert {scene.ground.texture for scene in SCENES} == set(TEXTURES)
    found = {r for scene in SCENES for a, b in permutations(scene.objects, 2) for r in relations(a, b)}
    assert found == set(RELATIONS) == {"left", "right", "above", "below"}


def test_number_of_objects_is_even_enough() -> None:
    counts = np.bincount([len(scene.objects) for scene in SCENES])[1:]
    assert counts.min() > 60


def test_held_out_pairs_use_each_colour_and_shape_once() -> None:
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    assert len(HELD_OUT) == len(COLOURS)


def test_seen_has_no_held_out_pair_and_heldout_has_one() -> None:
    def pairs(scene: Scene) -> set[tuple[str, str]]:
        return {(thing.colour, thing.shape) for thing in scene.objects}

    assert not any(pairs(scene) & HELD_OUT for scene in SCENES)
    held_out = [make_scene("eval", 0, index, "heldout") for index in range(300)]
    assert all(pairs(scene) & HELD_OUT for scene in held_out)
    mixed = [bool(pairs(make_scene("eval", 0, index, "all")) & HELD_OUT) for index in range(300)]
    assert any(mixed) and not all(mixed)
    seen_pairs = set().union(*(pairs(scene) for scene in SCENES))
    assert len(seen_pairs) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)


def test_the_number_decides_the_scene_and_splits_differ() -> None:
    assert make_scene("train", 3, 17) == make_scene("train", 3, 17)
    worlds = [("train", 0), ("eval", 0), ("test", 0), ("train", 1)]
    scenes = [make_scene(split, seed, index) for split, seed in worlds for index in range(300)]
    assert len(set(scenes)) == len(scenes)


def test_objects_stay_inside_and_largely_visible() -> None:
    overlaps = 0
    for scene in SCENES[:150]:
        hidden = np.zeros((SAMPLES * 64, SAMPLES * 64), np.bool_)
        for thing in reversed(scene.objects):
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
            mask = object_mask(thing, 64)
            covered = (mask & hidden).sum() / mask.sum()
            overlaps += covered > 0
            assert covered <= 0.2
            hidden |= mask
    assert overlaps > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_the_box_of_what_is_drawn(shape: str) -> None:
    thing = _thing(500, 520, shape, size="large")
    mask = object_mask(thing, SIDE // SAMPLES)
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    # The tip of a star or triangle is thinner than a sample, so it may start a few samples inside its box.
    assert np.abs(np.array(drawn) - np.array(thing.box)).max() <= 4
    assert drawn[0] >= thing.box[0] and drawn[1] >= thing.box[1]
    assert drawn[2] <= thing.box[2] and drawn[3] <= thing.box[3]


def test_relations_by_hand() -> None:
    centre = _thing(500, 500)
    assert relations(_thing(200, 500), centre) == {"left"}
    assert relations(_thing(800, 500), centre) == {"right"}
    assert relations(_thing(500, 200), centre) == {"above"}
    assert relations(_thing(500, 800), centre) == {"below"}
    assert relations(_thing(300, 300), centre) == {"left", "above"}
    assert relations(_thing(388, 500), centre) == {"left"}
    assert relations(_thing(389, 500), centre) == frozenset(), "too near to tell"
    assert relations(_thing(380, 800), centre) == {"below"}, "mostly along the other axis"


def test_relations_are_never_both_ways() -> None:
    for scene in SCENES:
        for a, b in permutations(scene.objects, 2):
            for relation in RELATIONS:
                opposite = OPPOSITES[relation]
                assert relation_holds(a, relation, b) == relation_holds(b, opposite, a)
                assert not (relation_holds(a, relation, b) and relation_holds(a, opposite, b))


def test_places_by_hand() -> None:
    assert _thing(200, 200).places == {"left", "top"}
    assert _thing(800, 500).places == {"right"}
    assert _thing(500, 800).places == {"bottom"}
    assert _thing(500, 500).places == {"middle"}


def test_count_and_select_by_hand() -> None:
    things = (_thing(200, 200), _thing(500, 500, "star"), _thing(800, 800, "star", "blue", "large"))
    scene = Scene(things, Ground("plain", "grey", 0))
    assert scene.count() == 3
    assert scene.count(shape="star") == 2
    assert scene.count(colour="red") == 2
    assert scene.count(shape="star", colour="red") == 1
    assert scene.count(size="large", colour="red") == 0
    assert scene.select(colour="blue") == (things[2],)


def test_facts_are_json_and_lead_back_to_the_scene() -> None:
    for scene in SCENES[:50]:
        facts = json.loads(json.dumps(scene.as_facts()))
        assert scene_from_facts(facts) == scene
        assert [tuple(thing["box"]) for thing in facts["objects"]] == [thing.box for thing in scene.objects]


def test_dice_are_fair_and_stay_in_bounds() -> None:
    dice = Dice("test")
    throws = [dice.between(1, 6) for _ in range(6000)]
    assert set(throws) == {1, 2, 3, 4, 5, 6}
    assert np.bincount(throws)[1:].min() > 850
    assert sorted(dice.shuffled(range(20))) == list(range(20))
    firsts = np.bincount([dice.shuffled(range(4))[0] for _ in range(4000)])
    assert firsts.min() > 850
