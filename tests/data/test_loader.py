"""Micro-batches: the same for any number of workers; broken examples leave their place empty."""

import dataclasses
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch

from tests.train.support import bits, tiny
from tests.train.tasks_support import TASKS, tuned
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, DataConfig
from vlmoe_core.data.example import Example
from vlmoe_core.data.loader import MicroBatch, MicroBatches, count_workers, load, load_all
from vlmoe_core.errors import DataError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tokenizers.text import fit_wordpiece
from vlmoe_core.train.build import build_dataset
from vlmoe_core.train.fitting import Tokenizers, obtain_labels

SIZES = "batch={size: {image: 4, text: 6, pair: 2}, micro: {image: 2, text: 3, pair: 1}}"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny(tmp_path, SIZES).recipe


def dataset(recipe: Recipe, training: bool = True) -> MicroBatches:
    tokenizers = Tokenizers(fit_wordpiece(["a red circle is left of the blue square ."] * 5, 60, True), None)
    split = recipe.data.train if training else recipe.data.eval
    return build_dataset(recipe, split, tokenizers, training)


def data_config(recipe: Recipe, **fields: object) -> DataConfig:
    return recipe.data.model_copy(update=fields)


def assert_same(left: MicroBatch, right: MicroBatch) -> None:
    assert (left.number, left.broken) == (right.number, right.broken)
    for stream in STREAMS:
        assert_same_batch(left.batches[stream], right.batches[stream])


def assert_same_batch(left: Batch, right: Batch) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        same = bits(value) == bits(other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_positions_of_a_micro_batch(recipe: Recipe) -> None:
    micro = dataset(recipe)[5]
    assert micro.number == 5
    assert micro.batches["image"].positions.tolist() == [10, 11]
    assert micro.batches["text"].positions.tolist() == [15, 16, 17]
    assert micro.batches["pair"].positions.tolist() == [5]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_examples_masks_and_crops_for_any_number_of_workers(
    recipe: Recipe, workers: int, training: bool
) -> None:
    made = dataset(recipe, training)
    numbers = range(1, 8, 2)
    expected = list(load(made, numbers, data_config(recipe, workers=0)))
    assert [m.number for m in expected] == list(numbers)
    found = list(load(made, numbers, data_config(recipe, workers=workers, prefetch=2)))
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert_same(left, right)


def test_masks_and_crops_differ_between_positions_and_epochs(recipe: Recipe) -> None:
    """50 images: position p and p + 50 are of different epochs, so no two of these share masks and crops."""
    made = dataset(recipe)
    masks = {made[n].batches["image"].patch_mask_IP.numpy().tobytes() for n in range(50)}
    assert len(masks) > 45


def test_a_data_set_survives_a_spawned_process(recipe: Recipe) -> None:
    made = dataset(recipe)
    assert_same(pickle.loads(pickle.dumps(made))[3], made[3])


def test_held_out_data_ends_at_the_limit_and_stays_the_same(recipe: Recipe) -> None:
    made = dataset(recipe, training=False)  # 3 of 10 examples of each stream
    positions = [made[n].batches["image"].positions.tolist() for n in range(3)]
    assert positions == [[0, 1], [2], []]
    assert_same(made[0], dataset(recipe, training=False)[0])
    other_seed = recipe.model_copy(update={"seed": 99})
    assert_same(made[0], dataset(other_seed, training=False)[0])


def test_held_out_data_ends_at_the_end_of_the_source(recipe: Recipe) -> None:
    long = recipe.train.model_copy(update={"eval_examples": 500})
    made = dataset(recipe.model_copy(update={"train": long}), training=False)
    drawn = [p for n in range(8) for p in made[n].batches["image"].positions.tolist()]
    assert drawn == list(range(10))


def test_a_stream_without_sources_is_an_empty_batch(tmp_path: Path) -> None:
    recipe = tiny(
        tmp_path,
        "batch={size: {text: 4}, micro: {text: 2}}",
        "data.train={text: [{source: scenes, size: 50}]}",
        "data.eval={}",
    ).recipe
    micro = dataset(recipe)[0]
    assert list(micro.batches) == list(STREAMS)
    assert [micro.batches[s].num_sequences for s in STREAMS] == [0, 2, 0]


class Hole:
    """A source of which one example is broken."""

    def __init__(self, source: object, hole: int) -> None:
        self.source, self.hole, self.blocks = source, hole, source.blocks  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Example:
        if index == self.hole:
            raise DataError(f"scene {index} is torn")
        return self.source[index]  # type: ignore[no-any-return, index]


def with_hole(made: MicroBatches, position: int) -> MicroBatches:
    """The example at a position of the image stream is broken."""
    image = made.streams["image"]
    torn = Hole(image.sources[0], image.orders[0](position))
    return dataclasses.replace(made, streams=made.streams | {"image": dataclasses.replace(image, sources=(torn,))})  # type: ignore[operator]


def test_skip_leaves_the_place_empty_and_moves_no_other(recipe: Recipe) -> None:
    sound, torn = dataset(recipe), with_hole(dataset(recipe), 5)
    data = data_config(recipe, on_error="skip", workers=0)
    for n, micro in enumerate(load(torn, range(6), data)):
        expected = sound[n]
        if n != 2:
            assert_same(micro, expected)
            continue
        (message,) = micro.broken
        assert message.endswith("is torn (position 5 of the image stream)")
        assert micro.batches["image"].positions.tolist() == [4]
        assert torch.equal(micro.batches["image"].pixels_ICHW, expected.batches["image"].pixels_ICHW[:1])
        assert torch.equal(micro.batches["image"].patch_mask_IP, expected.batches["image"].patch_mask_IP[:1])
        for stream in ("text", "pair"):
            assert_same_batch(micro.batches[stream], expected.batches[stream])  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_the_example_and_its_position(recipe: Recipe, workers: int) -> None:
    torn, data = with_hole(dataset(recipe), 5), data_config(recipe, workers=workers)
    micros = load(torn, range(6), data)
    assert [next(micros).number for _ in range(2)] == [0, 1]
    with pytest.raises(
        DataError, match=r"scene \d+ is torn \(position 5 of the image stream\); mend it, or set data\.on"
    ):
        next(micros)
    assert [len(m.broken) for m in load_all(torn, range(4), data)] == [0, 0, 1, 0]


def test_workers_leave_signals_to_the_training_process(recipe: Recipe) -> None:
    """A launcher signals the whole group: loader processes live on, though they have only just been started."""
    micros = load_all(dataset(recipe), range(40), data_config(recipe, workers=2, prefetch=1))
    for worker in micros._workers:  # type: ignore[attr-defined]
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
    assert [micro.number for micro in micros] == list(range(40))
    assert not {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_auto_leaves_a_core_to_training(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    auto = data_config(recipe, workers="auto")
    for cores, processes, workers in [(1, 1, 0), (2, 1, 1), (2, 2, 0), (64, 1, 4), (8, 4, 1), (16, 8, 1)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert count_workers(auto, processes) == workers
    assert count_workers(data_config(recipe, workers=3), 8) == 3


def of_task(tmp_path: Path, task: str, training: bool = False) -> MicroBatches:
    """The micro-batches of 4 of a task's data."""
    stream = {"classification": "image", "nli": "text"}.get(task, "pair")
    recipe = tuned(tmp_path, task, f"batch.micro.{stream}=4").recipe
    tokenizer = fit_wordpiece(["a red circle is left of the blue square ."] * 5, 60, True)
    tokenizers = Tokenizers(tokenizer, None, obtain_labels(recipe))
    return build_dataset(recipe, recipe.data.train if training else recipe.data.eval, tokenizers, training)


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_micro_batches_hold_its_one_stream_and_its_targets(tmp_path: Path, task: str) -> None:
    micro = of_task(tmp_path, task)[0]
    ((stream, batch),) = micro.batches.items()
    assert stream == {"classification": "image", "nli": "text"}.get(task, "pair")
    assert (batch.num_examples, batch.num_sequences) == (4, 8 if task == "nlvr2" else 4)
    assert (batch.targets is None) == (task == "retrieval")
    assert batch.num_masked_patches == batch.num_masked_words == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_records_stand_beside_the_examples_of_held_out_data(tmp_path: Path, workers: int) -> None:
    data = DataConfig.model_validate({"train": {}, "workers": workers})
    made = of_task(tmp_path, "nli")
    micros = list(load(made, range(3), data))
    assert [len(micro.records) for micro in micros] == [4, 2, 0]  # six examples
    for micro in micros:
        assert [record.position for record in micro.records] == micro.batches["text"].positions.tolist()
        for record in micro.records:
            example = made.streams["text"][record.position]
            assert (record.name, record.words, record.second_text) == (example.name, example.text, example.second_text)
            assert record.facts == example.facts and record.image_id == -1
    assert all(micro.records == () for micro in load(of_task(tmp_path, "nli", training=True), range(2), data))


def test_a_broken_example_has_no_record(tmp_path: Path) -> None:
    made = of_task(tmp_path, "classification")
    image = made.streams["image"]
    torn = Hole(image.sources[0], image.orders[0](1))  # type: ignore[union-attr]
    made = dataclasses.replace(made, streams={"image": dataclasses.replace(image, sources=(torn,))})  # type: ignore[type-var]
    micro = made[0]
    assert len(micro.broken) == 1 and [record.position for record in micro.records] == [0, 2, 3]
    assert micro.batches["image"].positions.tolist() == [0, 2, 3]
    targets = micro.batches["image"].targets
    assert targets is not None and len(targets) == 3
