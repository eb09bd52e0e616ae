"""Pictures with a class: one large object decides it, classes are even, the same everywhere."""

import hashlib
import json
from collections import Counter

import numpy as np

from vlmoe_core.data.scenes.classification import CLASSES, class_of, make_class_scene
from vlmoe_core.data.scenes.draw import SAMPLES, object_mask
from vlmoe_core.data.scenes.world import HELD_OUT, SHAPES

SCENES = [make_class_scene("train", 0, number) for number in range(1500)]


def test_the_class_is_the_shape_of_the_one_large_object() -> None:
    for scene in SCENES:
        large = [thing for thing in scene.objects if thing.size == "large"]
        assert [thing.shape for thing in large] == [class_of(scene)]
        assert scene.count(shape=class_of(scene)) == 1
        assert 1 <= len(scene.objects) <= 4
    assert set(CLASSES) == set(SHAPES)


def test_classes_and_numbers_of_objects_are_even() -> None:
    classes = Counter(class_of(scene) for scene in SCENES)
    assert set(classes) == set(CLASSES) and min(classes.values()) > 100
    assert min(Counter(len(scene.objects) for scene in SCENES).values()) > 300


def test_colours_and_grounds_tell_little_of_the_class() -> None:
    for of in (lambda scene: scene.objects[0].colour, lambda scene: scene.ground.texture):
        both = Counter((of(scene), class_of(scene)) for scene in SCENES)
        best = sum(max(both[value, name] for name in CLASSES) for value in {value for value, _ in both})
        assert best / len(SCENES) < 0.2


def test_the_large_object_lies_at_the_bottom_and_is_largely_visible() -> None:
    for scene in SCENES[:60]:
        hidden = np.zeros((SAMPLES * 64, SAMPLES * 64), np.bool_)
        for thing in scene.objects[1:]:
            hidden |= object_mask(thing, 64)
        mask = object_mask(scene.objects[0], 64)
        assert scene.objects[0].size == "large"
        assert (mask & hidden).sum() / mask.sum() < 0.25


def test_held_out_pairs() -> None:
    assert not any((thing.colour, thing.shape) in HELD_OUT for scene in SCENES for thing in scene.objects)
    for number in range(100):
        main = make_class_scene("eval", 0, number, "heldout").select(size="large")[0]
        assert (main.colour, main.shape) in HELD_OUT


def test_scenes_are_pinned() -> None:
    facts = json.dumps([scene.as_facts() for scene in SCENES[:200]])
    assert (
        hashlib.sha256(facts.encode()).hexdigest() == "81c717b78e7facf8eef48a8006a6e0e2466230f5c511a089ef388173e627ede3"
    )
