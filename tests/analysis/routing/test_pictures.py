"""What is shown of a trace, against a walk over every patch."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.analysis.routing.support import (
    SPECIAL,
    Heard,
    Token,
    batch_of,
    make_samples,
    routers_heard,
    sparse_encoder,
    tokens_of,
)
from tests.model.support import VOCAB
from vlmoe_core.analysis.routing.pictures import ExampleCollector, LikedPatch, PatchCollector
from vlmoe_core.analysis.routing.trace import Trace
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.model.encoder import Encoder

TOP = 3
GRID = 4
PIECES = [f"piece{i}" for i in range(VOCAB)]
SEPARATE: dict[str, Any] = {
    "vision": {"num_experts": 4, "layers": [0, 2], "eval_capacity_factor": 0.6},
    "text": {"num_experts": 3, "layers": [0, 1], "top_k": 2, "eval_capacity_factor": 0.6},
}
ONE_POOL: dict[str, Any] = {"shared": {"num_experts": 5, "layers": [0, 2], "top_k": 2, "eval_capacity_factor": 0.6}}
SETTINGS: dict[str, dict[str, Any]] = {
    "separate": {"moe": SEPARATE, "layers": 4},
    "one pool": {"moe": ONE_POOL, "expert_pool": "shared"},
}


class Walked(NamedTuple):
    """A patch that a plain loop came by."""

    gate: float
    image_id: int
    turn: int
    place: int
    name: str
    sample: Sample


def trace_of(encoder: Encoder) -> Trace:
    return Trace(encoder.config, VOCAB, special=SPECIAL)


def micros(stream: StreamName, encoder: Encoder, pictures: int = 1) -> list[list[Sample]]:
    """Three micro-batches; two captions each of most pictures, some of them in different micro-batches."""
    samples = make_samples(stream, [5, 9, 7, 12, 4, 6, 8, 5, 11, 4], encoder.config, pictures=pictures)
    ids = [0, 1, 1, 2, 0, 3, 4, 4, 5, 3]
    shown = [
        replace(s, image_id=i, pixels=samples[i].pixels, more_pixels=samples[i].more_pixels)
        for s, i in zip(samples, ids, strict=True)
    ]
    return [shown[:4], shown[4:5], shown[5:]]


def names_of(samples: Sequence[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def collected(
    encoder: Encoder, groups: Sequence[Sequence[Sample]], stream: StreamName, top: int = TOP
) -> PatchCollector:
    collector = PatchCollector(trace_of(encoder), top)
    for samples in groups:
        batch = batch_of(stream, samples, encoder.config)
        collector.receive(batch, encoder(batch), names_of(samples))
    return collector


def routed(one: Heard, tokens: Sequence[Token]) -> Iterator[tuple[int, Token]]:
    """Rows of a plan with their tokens."""
    return enumerate(t for t in tokens if one.pool in ("shared", "vl", t.modality))


def sequences(samples: Sequence[Sample]) -> list[tuple[Sample, int, int]]:
    """Sample, number in the batch and turn of every sequence."""
    return [(s, number, turn) for number, s in enumerate(samples) for turn in range(1 + len(s.more_pixels))]


def walked(
    encoder: Encoder, groups: Sequence[Sequence[Sample]], stream: StreamName
) -> dict[tuple[int, int], list[Walked]]:
    """Every patch in sight by the layer and expert of its first choice."""
    found: dict[tuple[int, int], list[Walked]] = defaultdict(list)
    for samples in groups:
        with routers_heard(encoder) as heard:
            encoder(batch_of(stream, samples, encoder.config))
        for one in heard:
            for row, token in routed(one, tokens_of(samples)):
                if token.kind == "patch":
                    sample, _, turn = sequences(samples)[token.sequence]
                    name = f"{sample.name}, picture {turn + 1}" if sample.more_pixels else sample.name
                    expert = int(one.plan.expert_TK[row, 0])
                    gate = one.plan.probs_TE[row, expert].item()
                    found[one.layer, expert].append(Walked(gate, sample.image_id, turn, token.place - 1, name, sample))
    return found


def best(patches: Sequence[Walked]) -> list[Walked]:
    """The best of each picture, and the best of those."""
    pictures: dict[tuple[int, int], Walked] = {}
    for one in sorted(patches, key=lambda p: -p.gate):
        pictures.setdefault((one.image_id, one.turn), one)
    return list(pictures.values())[:TOP]


def pixels_of(one: Walked) -> np.ndarray:
    """(H, W, 3)."""
    pixels = [one.sample.pixels, *one.sample.more_pixels][one.turn]
    assert pixels is not None
    return pixels.transpose(1, 2, 0)


def told(patch: LikedPatch) -> tuple[Any, ...]:
    """All of a patch, pixels as bytes."""
    values = (patch.task, patch.layer, patch.expert, patch.gate, patch.example, patch.place, patch.box)
    return (*values, patch.crop.size, patch.crop.tobytes())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("stream", "pictures"), [("image", 1), ("pair", 1), ("pair", 2)])
def test_each_expert_keeps_the_patches_of_its_largest_gates(setting: str, stream: StreamName, pictures: int) -> None:
    encoder = sparse_encoder(**SETTINGS[setting])
    groups = micros(stream, encoder, pictures)
    found: dict[tuple[int, int], list[LikedPatch]] = defaultdict(list)
    for patch in collected(encoder, groups, stream).liked():
        assert patch.task == {"image": "mim", "pair": "vlm"}[stream]
        found[patch.layer, patch.expert].append(patch)
    expected = walked(encoder, groups, stream)
    assert set(found) == set(expected) and any(len(own) == TOP for own in found.values())
    for place, patches in expected.items():
        wanted = [(p.gate, p.name, p.place) for p in best(patches)]
        assert [(p.gate, p.example, p.place) for p in found[place]] == wanted


def test_a_crop_is_the_patch_with_its_neighbours() -> None:
    encoder = sparse_encoder(**SETTINGS["separate"])
    groups, size, seen = micros("image", encoder), encoder.config.patch_size, set()
    by_name = {s.name: s for samples in groups for s in samples}
    for patch in collected(encoder, groups, "image", top=100).liked():
        picture = pixels_of(Walked(0, 0, 0, 0, "", by_name[patch.example]))
        row, column = divmod(patch.place, GRID)
        rows = [r for r in (row - 1, row, row + 1) if 0 <= r < GRID]
        columns = [c for c in (column - 1, column, column + 1) if 0 <= c < GRID]
        around = [[picture[r * size : (r + 1) * size, c * size : (c + 1) * size] for c in columns] for r in rows]
        crop = np.asarray(patch.crop)
        assert (crop == np.concatenate([np.concatenate(line, axis=1) for line in around])).all()
        left, top, right, bottom = patch.box
        inside = crop[top:bottom, left:right]
        assert (inside == picture[row * size : (row + 1) * size, column * size : (column + 1) * size]).all()
        seen.add((len(rows), len(columns)))
    assert seen == {(2, 2), (2, 3), (3, 2), (3, 3)}


def test_processes_that_share_the_batches_keep_what_one_would() -> None:
    encoder = sparse_encoder(**SETTINGS["one pool"])
    groups = micros("pair", encoder)
    alone = [told(p) for p in collected(encoder, groups, "pair").liked()]
    for share in ([0], [1, 2], [2, 0]):
        first = collected(encoder, [groups[i] for i in share], "pair")
        first.absorb(collected(encoder, [g for i, g in enumerate(groups) if i not in share], "pair").held)
        assert [told(p) for p in first.liked()] == alone


def test_equal_gates_are_kept_alike_in_any_order_of_batches() -> None:
    encoder = sparse_encoder(**SETTINGS["separate"])
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".router." in name:
                parameter.zero_()
    samples = [sample for group in micros("image", encoder) for sample in group]
    expected = []
    for picture in range(TOP):
        shown = [(p, s.position, s.name) for s in samples if s.image_id == picture for p in places_in_sight(s)]
        expected.append((0.25, *min(shown)))
    for seed in range(5):
        shuffled = random.Random(seed).sample(samples, len(samples))
        groups = [sorted(part, key=lambda s: s.position) for part in (shuffled[:3], shuffled[3:8], shuffled[8:])]
        liked = collected(encoder, groups, "image").liked()
        assert {p.expert for p in liked} == {0} and [p.layer for p in liked] == [0] * TOP + [2] * TOP
        assert [(p.gate, p.place, p.example) for p in liked] == [(g, place, name) for g, place, _, name in expected] * 2


def places_in_sight(sample: Sample) -> list[int]:
    assert sample.patch_mask is not None
    return np.flatnonzero(~sample.patch_mask).tolist()


def test_what_is_kept_does_not_grow_and_holds_no_batch() -> None:
    encoder = sparse_encoder(**SETTINGS["separate"])
    collector = PatchCollector(trace_of(encoder), TOP)
    for seed in range(6):
        samples = [
            replace(s, image_id=10 * seed + s.image_id) for s in make_samples("image", [1] * 10, encoder.config, seed)
        ]
        batch = batch_of("image", samples, encoder.config)
        collector.receive(batch, encoder(batch))
        before = [told(p) for p in collector.liked()]
        batch.pixels_ICHW.zero_()
        assert [told(p) for p in collector.liked()] == before
        assert len(collector.held) <= 4 * 2
        assert max(map(len, collector.held.values())) == TOP


def test_examples_without_names_are_called_by_their_picture() -> None:
    encoder = sparse_encoder(**SETTINGS["separate"])
    sample = make_samples("pair", [5], encoder.config)[0]
    batch = batch_of("pair", [replace(sample, image_id=7), replace(sample, image_id=-1, position=3)], encoder.config)
    collector = PatchCollector(trace_of(encoder), TOP)
    collector.receive(batch, encoder(batch))
    assert {patch.example for patch in collector.liked()} == {"image 7", "example 3"}
    with pytest.raises(ValueError, match="1 names for a batch of 2 examples"):
        collector.receive(batch, encoder(batch), ["one"])


def test_without_experts_of_pictures_there_are_no_patches() -> None:
    for values in ({}, {"moe": {"text": {"num_experts": 2, "layers": [0]}}}):
        encoder = sparse_encoder(**values)
        assert collected(encoder, micros("pair", encoder), "pair").liked() == ()
    assert collected(encoder, [make_samples("text", [5, 6], encoder.config)], "text").liked() == ()


def kept_examples(encoder: Encoder, batches: Sequence[Batch], most: int = 8) -> ExampleCollector:
    collector = ExampleCollector(trace_of(encoder), PIECES, most)
    for batch in batches:
        collector.receive(batch, encoder(batch))
    return collector


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("stream", "pictures"), [("image", 1), ("text", 1), ("pair", 1), ("pair", 2)])
def test_an_example_tells_where_each_token_went(setting: str, stream: StreamName, pictures: int) -> None:
    encoder = sparse_encoder(**SETTINGS[setting])
    samples = make_samples(stream, [5, 9, 7], encoder.config, pictures=pictures)
    batch, tokens = batch_of(stream, samples, encoder.config), tokens_of(samples)
    with routers_heard(encoder) as heard:
        examples = kept_examples(encoder, [batch]).examples()
    assert len(examples) == len(samples) * (pictures if stream == "pair" else 1)
    drops = 0
    for number, example in enumerate(examples):
        expected: dict[int, dict[str, list[tuple[int, bool]]]] = {}
        for one in heard:
            layer = expected.setdefault(one.layer, {"vision": [], "text": []})
            for row, token in routed(one, tokens):
                if token.sequence == number and (token.modality == "text" or token.kind != "[CLS]"):
                    choice = int(one.plan.expert_TK[row, 0]), bool(one.plan.kept_TK[row, 0])
                    layer[token.modality].append(choice)
                    drops += not choice[1]
        assert [one.layer for one in example.layers] == sorted(expected)
        for one in example.layers:
            assert one.grid == ((0, 0) if stream == "text" else (GRID, GRID))
            assert list(zip(one.patch_experts, one.patch_kept, strict=True)) == expected[one.layer]["vision"]
            assert list(zip(one.word_experts, one.word_kept, strict=True)) == expected[one.layer]["text"]
    assert drops > 0


@pytest.mark.parametrize(("stream", "pictures"), [("image", 1), ("text", 1), ("pair", 2)])
def test_an_example_shows_its_picture_and_words(stream: StreamName, pictures: int) -> None:
    encoder = sparse_encoder(**SETTINGS["separate"])
    samples = make_samples(stream, [5, 9], encoder.config, pictures=pictures)
    batch = batch_of(stream, samples, encoder.config)
    collector = ExampleCollector(trace_of(encoder), PIECES)
    collector.receive(batch, encoder(batch), ["one", "two"])
    for example, (sample, number, turn) in zip(collector.examples(), sequences(samples), strict=True):
        assert example.task == {"image": "mim", "text": "mlm", "pair": "vlm"}[stream]
        name = ["one", "two"][number]
        assert example.name == (f"{name}, picture {turn + 1}" if pictures > 1 else name)
        ids = [] if sample.text_ids is None else sample.text_ids.tolist()
        assert example.words == tuple(PIECES[i] for i in ids)
        pixels = None if sample.pixels is None else [sample.pixels, *sample.more_pixels][turn].transpose(1, 2, 0)
        assert (example.image is None) == (pixels is None)
        if example.image is not None:
            assert example.image.mode == "RGB" and (np.asarray(example.image) == pixels).all()


def test_the_first_examples_of_each_stream_are_kept() -> None:
    encoder = sparse_encoder(**SETTINGS["separate"])
    text = [batch_of("text", make_samples("text", [5] * 2, encoder.config, seed), encoder.config) for seed in range(3)]
    image = batch_of("image", make_samples("image", [1] * 5, encoder.config), encoder.config)
    empty = batch_of("pair", [], encoder.config)
    found = kept_examples(encoder, [empty, text[0], image, text[1], text[2]], most=3).examples()
    tasks = [example.task for example in found]
    assert tasks == ["mlm", "mlm", "mim", "mim", "mim", "mlm"]
    ids = [*text[0].text_ids_T.tolist(), *text[1].text_ids_T[:5].tolist()]
    assert [word for example in found for word in example.words] == [PIECES[i] for i in ids]


def test_of_a_dense_model_pictures_and_words_are_left() -> None:
    encoder = sparse_encoder()
    batch = batch_of("pair", make_samples("pair", [5], encoder.config), encoder.config)
    (example,) = kept_examples(encoder, [batch]).examples()
    assert example.layers == () and len(example.words) == 5 and example.image is not None
