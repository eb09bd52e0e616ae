"""The pictures: the same bytes everywhere, colours as named, grounds that no object is lost on."""

import hashlib

import numpy as np
import pytest

from vlmoe_core.data.scenes.draw import PALETTE, draw, object_mask, pixel_box
from vlmoe_core.data.scenes.ground import ground_pixels
from vlmoe_core.data.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, TONES, Ground, Scene, SceneObject, make_scene

PINNED = {
    ("train", 0, 0, "seen", 64): "54450ffc5c10e7ce03b85909b0a208d945668934e8029dfa7c9a62e2b837debc",
    ("train", 0, 4, "seen", 64): "165bbfae5b199bbfb9679fd9e556aa09c3fa6c1dcd740fb9e991bdeaf76ef52d",
    ("train", 7, 12345, "seen", 64): "3ec18ff386f357e984cf9932f134afd92fe1207f79c00ecc5fc3874b5c61170c",
    ("eval", 0, 1, "heldout", 64): "4ec2ab6a50b515b493008b0a78871dc5a21ed57acaf5350b7aaa0fb4e83fd903",
    ("test", 0, 2, "all", 64): "0a24ef36532e664234005e9df3b012cf68062c88226235f3f8887cb935df4eb4",
    ("train", 0, 0, "seen", 97): "87d7140a73c9ed4eac9b8b7d5723d660905e1047cf8a35e163841b54e640f288",
    ("train", 0, 3, "seen", 224): "b7afdc678e979c80c5261745d7551da2d49225fa13fd2739c6b7b50f6ec6113b",
}
TEXTURE_PINS = {
    "plain": "b3ef72e5c4ada0206753ab43c8c55f38615f8fc35328866736dcb47642c2e2e6",
    "striped": "e85ee017f4703860528a66e6d222a66cbe25c351b54a5d60e132af78243ce047",
    "checkered": "b5cd4ef42f624d8df412693dc09f5ba853dce2dfdd841348e1db444cdc0015c6",
    "dotted": "6d47033869b3ea6bdee6146fea93f82e12d41f949e565886591a2580bf0a30d2",
    "shaded": "b78a0f20a835aa0068796c034b12b9044c268970deda41d0825a7e10160ee464",
    "mottled": "0faa612d6d1375079b61800bd5112f227127f1e67a063943bf5e447284d43d15",
}


@pytest.mark.parametrize("key", PINNED, ids=str)
def test_pixels_are_pinned(key: tuple[str, int, int, str, int]) -> None:
    split, seed, index, combinations, image_size = key
    picture = draw(make_scene(split, seed, index, combinations), image_size)  # type: ignore[arg-type]
    assert (picture.mode, picture.size) == ("RGB", (image_size, image_size))
    assert hashlib.sha256(picture.tobytes()).hexdigest() == PINNED[key]


@pytest.mark.parametrize("texture", TEXTURES)
def test_every_texture_is_pinned(texture: str) -> None:
    pixels = b"".join(
        ground_pixels(Ground(texture, "mist", variant), 64).astype(np.uint8).tobytes()
        for variant in range(0, 2**16, 4099)
    )
    assert hashlib.sha256(pixels).hexdigest() == TEXTURE_PINS[texture]


@pytest.mark.parametrize("shape", SHAPES)
def test_inside_of_an_object_has_its_colour(shape: str) -> None:
    for colour in COLOURS:
        thing = SceneObject(shape, colour, "medium", (500, 500))
        scene = Scene((thing,), Ground("plain", "grey", 0))
        pixels = np.array(draw(scene, 64)).reshape(-1, 3)
        assert (pixels == PALETTE[colour]).all(axis=1).sum() >= 24


@pytest.mark.parametrize("texture", TEXTURES)
def test_an_object_changes_nothing_outside_its_box(texture: str) -> None:
    for seed, shape in enumerate(SHAPES):
        thing = SceneObject(shape, "red", SIZES[seed % 3], (400 + 13 * seed, 430))
        ground = Ground(texture, "sand", 7919 * seed)
        changed = (np.array(draw(Scene((thing,), ground), 64)) != np.array(draw(Scene((), ground), 64))).any(axis=2)
        left, top, right, bottom = pixel_box(thing, 64)
        assert changed[top:bottom, left:right].mean() > 0.25
        changed[top:bottom, left:right] = False
        assert not changed.any()


@pytest.mark.parametrize("tone", TONES)
def test_grounds_are_muted_and_far_from_every_object_colour(tone: str) -> None:
    colours = np.array(list(PALETTE.values()))
    for texture in TEXTURES:
        for variant in range(0, 2**16, 2731):
            pixels = ground_pixels(Ground(texture, tone, variant), 32).reshape(-1, 3)
            assert pixels.min() >= 0 and pixels.max() <= 255
            assert (pixels.max(axis=1) - pixels.min(axis=1)).max() <= 40
            distance = np.linalg.norm(pixels[:, None] - colours[None], axis=2)
            assert distance.min() > 45


def test_colours_are_clearly_distinct() -> None:
    colours = np.array([PALETTE[colour] for colour in COLOURS])
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1000 * np.eye(len(colours))
    assert distance.min() > 80


def test_shapes_are_clearly_distinct_even_when_small() -> None:
    masks = [object_mask(SceneObject(shape, "red", "small", (500, 500)), 64) for shape in SHAPES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert (a & b).sum() / (a | b).sum() < 0.92


def test_the_scene_is_the_same_at_every_size() -> None:
    scene = make_scene("train", 0, 5)
    small = np.array(draw(scene, 64)).astype(float)
    large = np.array(draw(scene, 256)).astype(float).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - large).mean() < 6
