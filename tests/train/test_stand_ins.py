"""Random examples and first documents."""

from pathlib import Path

import numpy as np

from tests.train.support import tiny
from vlmoe_core.data.example import Source
from vlmoe_core.data.stream import open_streams
from vlmoe_core.train.stand_ins import (
    NOISE_EXAMPLES,
    NUM_SPECIALS,
    FirstDocuments,
    NumberEncoder,
    noise_streams,
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
