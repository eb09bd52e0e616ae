"""The source `scenes`: the contract of sources, and what its options do."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from vlmoe_core.data.config import SplitConfig, StreamName
from vlmoe_core.data.example import SourceContext, TextEncoder
from vlmoe_core.data.scenes.facts import statement_from_facts
from vlmoe_core.data.scenes.world import HELD_OUT, scene_from_facts
from vlmoe_core.data.sources import scenes
from vlmoe_core.data.sources.scenes import Config, ImageScenes, PairScenes, TextScenes, open_source


class Words:
    """A text encoder with one token a word."""

    vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id, fingerprint = 1000, 0, 1, 2, 3, 4, "words"

    def encode(self, text: str) -> list[int]:
        return [5] * len(text.split())


def _open(
    config: Config, stream: StreamName, max_text: int = 128, text_encoder: TextEncoder | None = None
) -> ImageScenes | PairScenes | TextScenes:
    return open_source(config, SourceContext(stream, Path(), max_text, text_encoder))


def test_a_recipe_finds_it_by_name() -> None:
    split = SplitConfig.model_validate({"pair": [{"source": "scenes", "size": 7, "split": "eval"}]})
    config = split.pair[0]
    assert isinstance(config, Config)
    assert (config.size, config.split, config.combinations, config.image_size) == (7, "eval", "seen", 64)
    assert Config().size == 20_000


@pytest.mark.parametrize("combinations", ["heldout", "all"])
def test_training_on_held_out_pairs_is_refused(combinations: str) -> None:
    with pytest.raises(ValidationError, match=f"combinations: {combinations} would train on held-out pairs"):
        Config.model_validate({"split": "train", "combinations": combinations})
    assert Config.model_validate({"split": "test", "combinations": combinations}).combinations == combinations


@pytest.mark.parametrize("stream", ["image", "pair", "text"])
def test_length_blocks_and_ends(stream: StreamName) -> None:
    source = _open(Config(size=10, captions_per_image=3), stream)
    assert len(source) == (30 if stream == "pair" else 10)
    assert sum(source.blocks) == len(source)
    assert source[len(source) - 1].name.startswith("scenes/train/0/9")
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source[outside]


def test_image_and_pair_show_the_same_scenes() -> None:
    config = Config(size=4, captions_per_image=3, image_size=48)
    images, pairs = _open(config, "image"), _open(config, "pair")
    captions = set()
    for index in range(len(pairs)):
        pair, image = pairs[index], images[index // 3]
        assert pair.image_id == image.image_id == index // 3
        assert pair.facts["scene"] == image.facts["scene"]
        assert pair.image.size == (48, 48)
        assert pair.image.tobytes() == image.image.tobytes()
        assert image.text is None and pair.text
        captions.add(pair.text)
    assert len(captions) > 8


def test_facts_are_json_and_the_caption_is_true_of_them() -> None:
    pairs = _open(Config(size=40, split="eval", combinations="heldout"), "pair")
    for index in range(len(pairs)):
        facts = json.loads(json.dumps(dict(pairs[index].facts)))
        scene = scene_from_facts(facts["scene"])
        assert scene.satisfies(statement_from_facts(facts["meaning"]))
        assert any((thing.colour, thing.shape) in HELD_OUT for thing in scene.objects)


@pytest.mark.parametrize("stream", ["pair", "text"])
def test_texts_are_those_of_the_examples_and_draw_nothing(stream: StreamName, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _open(Config(size=15, captions_per_image=2), stream)
    expected = [source[index].text for index in range(len(source))]
    monkeypatch.setattr(scenes, "draw", lambda *_: pytest.fail("texts drew a picture"))
    assert list(source.texts()) == expected


def test_images_have_no_texts() -> None:
    assert list(_open(Config(size=3), "image").texts()) == []


@pytest.mark.parametrize("max_text", [3, 14, 30])
def test_a_document_loses_whole_sentences_from_its_end(max_text: int) -> None:
    config, encoder = Config(size=60), Words()
    cut, whole = _open(config, "text", max_text, encoder), _open(config, "text")
    shorter = 0
    for index in range(len(cut)):
        text, full = cut[index].text, whole[index].text
        assert full.startswith(text) and text.endswith(".")
        shorter += text != full
        sentences, all_sentences = text.count("."), full.count(".")
        assert sentences >= 1
        if sentences > 1:
            assert len(encoder.encode(text)) + 2 <= max_text
        if sentences < all_sentences:
            longer = ".".join(full.split(".")[: sentences + 1]) + "."
            assert len(encoder.encode(longer)) + 2 > max_text
    assert shorter > 0


def test_seed_and_split_change_what_is_shown() -> None:
    captions = [
        tuple(_open(Config(size=20, seed=seed, split=split), "pair").texts())
        for seed, split in ((0, "train"), (1, "train"), (0, "eval"), (0, "test"))
    ]
    assert len(set(captions)) == 4


def test_examples_do_not_depend_on_the_order_of_asking() -> None:
    source = _open(Config(size=50), "pair")
    forward = [source[index].image.tobytes() for index in range(10)]
    backward = [source[index].image.tobytes() for index in reversed(range(10))]
    assert forward == backward[::-1]
