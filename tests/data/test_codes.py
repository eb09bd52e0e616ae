"""Stored visual codes: written, read back by position, and refused where they are of something else."""

import json
import pickle
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.train.support import tiny
from vlmoe_core.data.codes import (
    BROKEN,
    TOKENS_FILE,
    Manifest,
    Part,
    StoredCodes,
    crop_of,
    is_whole,
    read_manifest,
    write_shard,
)
from vlmoe_core.data.example import Sample
from vlmoe_core.data.loader import MicroBatches, load
from vlmoe_core.errors import DataError, TokenizerError
from vlmoe_core.train.build import build_image_dataset

PATCHES = 4
PART = Part("train", "image", 7, 3)
MANIFEST = Manifest("abc", "fp32", 16, PATCHES, 100, (PART, Part("eval", "pair", 2, 3)))


def pixels(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (3, 4, 4), np.uint8)


def sample(position: int, *more: NDArray[np.uint8]) -> Sample:
    return Sample(f"picture {position}", position, pixels=pixels(position), more_pixels=more)


def row(position: int) -> list[int]:
    return [position * 10 + patch for patch in range(PATCHES)]


@pytest.fixture
def stored(tmp_path: Path) -> StoredCodes:
    """Seven positions in three shards; the example at 5 is broken."""
    for number in range(PART.num_files):
        span = PART.span(number)
        crops = [BROKEN if p == 5 else crop_of([pixels(p)]) for p in span]
        codes_NP = np.array([row(p) for p in span], MANIFEST.dtype)
        write_shard(tmp_path / PART.file(number), codes_NP, np.array(crops, np.int64))
    return StoredCodes(tmp_path, PART, PATCHES)


def test_a_crop_is_the_crc_of_its_pixels_in_their_order() -> None:
    whole, one = pixels(1), pixels(1)
    assert crop_of([whole]) == zlib.crc32(whole.tobytes()) >= 0
    seen_askew = np.asfortranarray(whole)
    assert not seen_askew.flags.c_contiguous and crop_of([seen_askew]) == crop_of([whole])
    one[2, 3, 3] ^= 1
    assert crop_of([one]) != crop_of([whole])
    assert crop_of([whole, one]) == zlib.crc32(whole.tobytes() + one.tobytes())


def test_every_position_gives_its_own_codes_in_any_order(stored: StoredCodes) -> None:
    for position in (0, 6, 2, 3, 1, 4, 0):
        codes_P = stored.of(sample(position))
        assert codes_P.tolist() == row(position) and codes_P.dtype == np.int64
    assert [shard.num_broken for shard in stored.shards()] == [0, 1, 0]


def test_a_process_maps_the_shards_anew(stored: StoredCodes) -> None:
    stored.of(sample(4))
    state = pickle.dumps(stored)
    assert len(state) < 1000
    assert pickle.loads(state).of(sample(4)).tolist() == row(4)


def test_other_pixels_are_refused_with_their_position(stored: StoredCodes) -> None:
    with pytest.raises(TokenizerError, match=r"position 3 of the image stream \(train\) .* of there there: data, seed"):
        stored.of(replace(sample(4), position=3, name="there"))
    with pytest.raises(TokenizerError, match="position 2"):
        stored.of(sample(2, pixels(9)))
    with pytest.raises(TokenizerError, match="position 5"):  # broken when it was stored
        stored.of(sample(5))
    with pytest.raises(TokenizerError, match="holds 7 positions of train-image, not position 7"):
        stored.of(sample(7))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is not there: the tokens were not all stored"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(path.with_name(PART.file(2)).read_bytes()), "holds other shapes"),
    ],
)
def test_a_shard_that_is_not_whole_is_refused(stored: StoredCodes, damage: object, message: str) -> None:
    path = stored.folder / PART.file(1)
    assert is_whole(stored.folder, PART, 1, PATCHES)
    damage(path)  # type: ignore[operator]
    assert not is_whole(stored.folder, PART, 1, PATCHES)
    assert stored.of(sample(2)).tolist() == row(2)
    for refused in (lambda: stored.of(sample(3)), stored.check):
        with pytest.raises(TokenizerError, match=message) as caught:
            refused()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(("codes", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_the_last_code_survives(tmp_path: Path, codes: int, dtype: type) -> None:
    manifest = replace(MANIFEST, codes=codes)
    assert manifest.dtype is dtype and manifest.row_bytes == PATCHES * np.dtype(dtype).itemsize + 8
    part = Part("train", "image", 1, 1)
    write_shard(tmp_path / part.file(0), np.full((1, PATCHES), codes - 1, dtype), np.array([crop_of([pixels(0)])]))
    assert StoredCodes(tmp_path, part, PATCHES).of(sample(0)).tolist() == [codes - 1] * PATCHES


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / TOKENS_FILE)
    assert read_manifest(tmp_path) == MANIFEST and MANIFEST.positions == 9
    assert MANIFEST.find("eval", "pair") == MANIFEST.parts[1] and MANIFEST.find("eval", "image") is None
    assert [list(PART.span(n)) for n in range(PART.num_files)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_manifest_names_what_differs() -> None:
    assert MANIFEST.differences(MANIFEST) == ""
    other = replace(MANIFEST, precision="bf16", parts=(PART,))
    assert MANIFEST.differences(other) == (
        "precision fp32, not bf16; parts 7 positions of train-image, 2 positions of eval-pair, not 7 positions of "
        "train-image"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no stored tokens .* make them with vlmoe data tokenize"),
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ('{"format": 1, "parts": []}', "can't be read"),
        ('{"format": 2}', "has another format than 1; use a newer vlmoe"),
    ],
)
def test_a_manifest_that_is_none_is_one_message(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / TOKENS_FILE).write_text(text)
    with pytest.raises(TokenizerError, match=message):
        read_manifest(tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> MicroBatches:
    """Images of the tiny recipe in micro-batches of two, with codes 16 x position + patch."""
    recipe = tiny(tmp_path).recipe
    dataset = build_image_dataset(recipe, recipe.data.train.model_copy(update={"pair": ()}), training=True)
    stream = dataset.streams["image"]
    samples = [dataset.preparer("image", p, stream[p], stream.random(p)) for p in range(8)]
    crops = [crop_of([s.pixels]) for s in samples if s.pixels is not None]
    part = Part("train", "image", 8, 5)
    for number in range(part.num_files):
        span = part.span(number)
        codes_NP = np.array([[16 * p + patch for patch in range(16)] for p in span], np.uint16)
        write_shard(tmp_path / part.file(number), codes_NP, np.array([crops[p] for p in span]))
    return replace(dataset, names=("image",), codes={"image": StoredCodes(tmp_path, part, 16)})


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_bring_their_codes(images: MicroBatches, tmp_path: Path, workers: int) -> None:
    data = tiny(tmp_path).recipe.data.model_copy(update={"workers": workers})
    batches = [micro.batches["image"] for micro in load(images, range(4), data)]
    for batch in batches:
        assert batch.codes_IP is not None and batch.codes_IP[:, 3].tolist() == (batch.positions * 16 + 3).tolist()
    assert [p for batch in batches for p in batch.positions.tolist()] == list(range(8))


def test_a_broken_example_takes_its_codes_along(images: MicroBatches) -> None:
    stream = images.streams["image"]

    class Broken:
        sources, epoch, random = stream.sources, stream.epoch, stream.random

        def __getitem__(self, position: int) -> object:
            if position == 2:
                raise DataError("broken")
            return stream[position]

    micro = replace(images, streams={"image": Broken()})[1]  # type: ignore[dict-item]
    batch = micro.batches["image"]
    assert len(micro.broken) == 1 and batch.positions.tolist() == [3]
    assert batch.codes_IP is not None and batch.codes_IP.tolist() == [list(range(48, 64))]


@pytest.mark.parametrize("workers", [0, 2])
def test_codes_of_other_pixels_end_the_run_in_one_line(images: MicroBatches, tmp_path: Path, workers: int) -> None:
    data = tiny(tmp_path).recipe.data.model_copy(update={"workers": workers, "on_error": "skip"})
    path = tmp_path / "train-image-00001.safetensors"
    write_shard(path, np.zeros((3, 16), np.uint16), np.array([1, 2, 3]))
    micros = load(images, range(4), data)
    assert [next(micros).number for _ in range(2)] == [0, 1]
    with pytest.raises(TokenizerError, match=r"the codes at position 5 of the image stream \(train\)") as caught:
        list(micros)
    assert "\n" not in str(caught.value)


def test_what_tells_of_tokens_is_plain_json(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / TOKENS_FILE)
    said = json.loads((tmp_path / TOKENS_FILE).read_text())
    assert said["format"] == 1 and said["fingerprint"] == "abc" and said["parts"][0]["positions"] == 7
