"""Random examples and first documents."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.support import tiny
from tests.train.tasks_support import TASKS, tuned
from vlmoe_core.data.example import Source
from vlmoe_core.data.stream import open_streams
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.stand_ins import (
    MADE_UP_LABELS,
    NOISE_EXAMPLES,
    NUM_SPECIALS,
    FirstDocuments,
    NoiseTeacher,
    NumberEncoder,
    noise_streams,
    stand_in_labels,
    with_first_documents,
)


def test_noise_has_the_sizes_of_the_recipe(tmp_path: Path) -> None:
    recipe = tiny(tmp_path).recipe
    streams = noise_streams(recipe)
    encoder = NumberEncoder(recipe.tokenizers.text.vocab_size)
    assert list(streams) == ["image", "text", "pair"]
    for name, stream in streams.items():
        example = stream[0]
        assert (example.image is None) == (name == "text") and (example.text is None) == (name == "image")
        if example.image is not None and not isinstance(example.image, bytes):
            assert example.image.size == (recipe.model.image_size,) * 2
            assert np.asarray(example.image).std() > 30
        if example.text is not None:
            ids = encoder.encode(example.text)
            assert len(ids) == getattr(recipe.data.max_text, name) - 2
            assert min(ids) >= NUM_SPECIALS and max(ids) < encoder.vocab_size
    assert len(list(streams["text"].sources[0].texts())) == NOISE_EXAMPLES
    assert not list(streams["image"].sources[0].texts())


@pytest.mark.parametrize("task", TASKS)
def test_noise_tells_what_a_task_must_predict(tmp_path: Path, task: str) -> None:
    recipe = tuned(tmp_path, task).recipe
    assert recipe.task is not None
    opened, labels = open_task(recipe.task), stand_in_labels(recipe)
    assert len(labels.names) == {"nlvr2": 2, "nli": 3, "retrieval": 0}.get(task, MADE_UP_LABELS)
    (stream,) = noise_streams(recipe, labels).values()
    assert stream.name == opened.stream
    targets = [opened.target(stream[position], labels, training=True) for position in range(40)]
    if task == "retrieval":
        assert targets == [None] * 40
    elif task == "vqa":
        assert all(t is not None and t.shape == (MADE_UP_LABELS,) and t.sum() == 1 for t in targets)
        assert len({int(t.argmax()) for t in targets if t is not None}) > 20
    else:
        numbers = {int(t) for t in targets if t is not None}
        assert len(numbers) == len(labels.names) or len(numbers) > 20
    assert (stream[0].second_text is not None) == (task == "nli")


def test_pretraining_has_no_labels(tmp_path: Path) -> None:
    assert stand_in_labels(tiny(tmp_path).recipe) == NO_LABELS


def test_a_teacher_of_noise() -> None:
    teacher = NoiseTeacher(24, 9)
    teacher.load()
    features_IPO = teacher.features(torch.zeros(2, 3, 12, 12, dtype=torch.uint8))
    assert teacher.dim == 24 and features_IPO.shape == (2, 9, 24) and features_IPO.std() > 0.5


def test_only_sources_without_examples_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One document.\nAnother one.\n")
    recipe = tiny(tmp_path, f"data.train.text=[{{source: scenes}}, {{source: text, path: {tmp_path}/text.txt}}]").recipe
    opened = open_streams(recipe.data, recipe.data.train, 0)["text"]
    assert [len(source) for source in opened.sources] == [len(opened.sources[0]), 0]
    scenes, documents = with_first_documents(opened).sources
    assert scenes is opened.sources[0] and isinstance(documents, FirstDocuments)
    as_source: Source = documents
    assert [as_source[i].text for i in range(len(as_source))] == ["One document.", "Another one."]
    assert list(as_source.texts()) == ["One document.", "Another one."]
