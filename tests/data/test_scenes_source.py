"""The source `scenes`: the contract of sources, and what its options do."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from vlmoe_core.data.config import SplitConfig, StreamName
from vlmoe_core.data.example import LabelledSource, SourceContext, TextEncoder
from vlmoe_core.data.scenes.drafts import Task
from vlmoe_core.data.scenes.draw import draw
from vlmoe_core.data.scenes.facts import statement_from_facts
from vlmoe_core.data.scenes.world import HELD_OUT, Split, scene_from_facts
from vlmoe_core.data.sources import scenes
from vlmoe_core.data.sources.scenes import Config, DocumentSource, SceneSource, open_source
from vlmoe_core.errors import DataError


class Words:
    """A text encoder with one token a word."""

    vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id, fingerprint = 1000, 0, 1, 2, 3, 4, "words"

    def encode(self, text: str) -> list[int]:
        return [5] * len(text.split())


def _open(
    config: Config, stream: StreamName, max_text: int = 128, text_encoder: TextEncoder | None = None
) -> SceneSource | DocumentSource:
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


TASKS: list[tuple[Task | None, StreamName]] = [
    ("vqa", "pair"),
    ("nlvr2", "pair"),
    ("classification", "image"),
    ("nli", "text"),
    (None, "image"),
    (None, "pair"),
    (None, "text"),
]


@pytest.mark.parametrize(("task", "stream"), TASKS)
def test_records_are_the_examples_without_pictures(
    task: Task | None, stream: StreamName, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _open(Config(task=task, size=6, captions_per_image=2, questions_per_image=3), stream)
    examples = [source[index] for index in range(len(source))]
    monkeypatch.setattr(scenes, "draw", lambda *_: pytest.fail("records drew a picture"))
    assert isinstance(source, LabelledSource)
    assert list(source.records()) == [replace(example, image=None, more_images=()) for example in examples]
    texts = [text for e in examples for text in (e.text, e.second_text) if text is not None]
    assert list(source.texts()) == texts
    assert len({example.name for example in examples}) == len(examples)


@pytest.mark.parametrize(("task", "stream"), TASKS)
def test_sources_are_pickled_and_give_the_same(task: Task | None, stream: StreamName) -> None:
    source = _open(Config(task=task, size=4), stream)
    again = pickle.loads(pickle.dumps(source))
    assert list(again.records()) == list(source.records())
    assert again[3] == source[3]


@pytest.mark.parametrize(("task", "stream"), TASKS[:4])
def test_another_stream_is_refused_and_the_right_one_named(task: Task, stream: StreamName) -> None:
    for other in {"image", "text", "pair"} - {stream}:
        with pytest.raises(
            DataError, match=f"task: {task} .* '{stream}', not '{other}': list this source under '{stream}'"
        ):
            _open(Config(task=task, size=4), other)


def test_questions() -> None:
    source = _open(Config(task="vqa", size=20, questions_per_image=3), "pair")
    assert len(source) == 60 == sum(source.blocks)
    captioned = _open(Config(size=20), "pair")
    for index in range(len(source)):
        example = source[index]
        facts = example.facts
        assert (example.image_id, facts["id"]) == (index // 3, index)
        assert facts["answers"] == (facts["answer"],) * 10
        assert facts["answer_type"] in ("yes/no", "number", "other") and facts["question_type"]
        assert example.text.endswith("?") and example.more_images == ()
        if index % 3 == 0:
            assert example.image == captioned[index // 3].image, "the pictures of pretraining"


def test_statements_of_two_pictures() -> None:
    source = _open(Config(task="nlvr2", size=10, split="eval", image_size=32), "pair")
    assert len(source) == 20 == sum(source.blocks)
    examples = [source[index] for index in range(len(source))]
    assert [e.facts["id"] for e in examples[:5]] == [
        "eval-0-0-0",
        "eval-0-0-1",
        "eval-0-1-0",
        "eval-0-1-1",
        "eval-1-0-0",
    ]
    assert [e.image_id for e in examples[:5]] == [0, 0, 1, 1, 2]
    for example in examples:
        assert example.image.size == (32, 32) and len(example.more_images) == 1
        left, right = (draw(scene_from_facts(facts), 32) for facts in example.facts["scenes"])
        assert (example.image, *example.more_images) == (left, right)
        assert example.facts["label"] in ("True", "False")
    groups: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        _, number, _, sentence = example.facts["id"].split("-")
        groups.setdefault((number, sentence), []).append(example.facts["label"])
        assert len({e.text for e in examples if e.facts["id"].split("-")[1::2] == [number, sentence]}) == 1
    assert all(sorted(labels) == ["False", "True"] for labels in groups.values())


def test_an_odd_number_of_pairs_of_pictures_is_refused() -> None:
    with pytest.raises(ValidationError, match="size: 7 is odd; the pairs of pictures of nlvr2 come in twos"):
        Config(task="nlvr2", size=7)
    assert Config(size=7).size == 7


def test_classes() -> None:
    source = _open(Config(task="classification", size=30), "image")
    assert len(source) == 30
    for index in range(len(source)):
        example = source[index]
        assert example.image_id == index and example.text is None
        assert example.image.size == (64, 64)
        (main,) = scene_from_facts(example.facts["scene"]).select(size="large")
        assert example.facts["label"] == main.shape
        assert example.facts["id"] == example.name


def test_premises_and_hypotheses() -> None:
    source = _open(Config(task="nli", size=60), "text")
    examples = [source[index] for index in range(len(source))]
    assert {e.facts["label"] for e in examples} == {"entailment", "neutral", "contradiction"}
    assert all(e.text and e.second_text and e.image is None and e.image_id == -1 for e in examples)
    assert [e.facts["id"] for e in examples] == [e.name for e in examples]


@pytest.mark.parametrize(("task", "stream"), TASKS[:4])
def test_splits_and_seeds_of_tasks_differ(task: Task, stream: StreamName) -> None:
    worlds: list[tuple[Split, int]] = [("train", 0), ("train", 1), ("eval", 0), ("test", 0)]
    seen = [
        tuple(
            (e.text, str(e.facts.get("scene")))
            for e in _open(Config(task=task, size=8, split=s, seed=n), stream).records()
        )
        for s, n in worlds
    ]
    assert len(set(seen)) == 4


def test_captions_tell_pictures_apart() -> None:
    """Retrieval among 100: if one who understands all takes a picture at random of those that a caption fits."""
    source = _open(Config(split="eval", size=300), "pair")
    captions = list(source.records())
    worlds = [scene_from_facts(record.facts["scene"]) for record in captions]
    meanings = [statement_from_facts(record.facts["meaning"]) for record in captions]
    fitting = [
        sum(worlds[i - i % 100 + other].satisfies(meaning) for other in range(100))
        for i, meaning in enumerate(meanings)
    ]
    assert min(fitting) >= 1
    assert sum(1 / number for number in fitting) / len(fitting) > 0.5
