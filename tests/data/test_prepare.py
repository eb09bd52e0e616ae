"""From an example to a sample: lengths, padding, and errors that name the example."""

import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data.files_support import WordEncoder, jpeg
from vlmoe_core.data.config import DataConfig, StreamName
from vlmoe_core.data.example import Example
from vlmoe_core.data.prepare import Preparer, build_preparer
from vlmoe_core.errors import DataError


class HideSecond:
    """Hides the second token and the first patch, and draws from the generator."""

    def text(self, ids: list[int], stream: StreamName, rng: random.Random) -> tuple[list[int], list[int]]:
        return [ids[0], 4, *ids[2:]], [-1, ids[1]] + [-1] * (len(ids) - 2)

    def image(self, stream: StreamName, rng: random.Random) -> NDArray[np.bool_]:
        return np.arange(4) == rng.randrange(4)


def preparer(training: bool = True, **fields: object) -> Preparer:
    data = DataConfig.model_validate({"train": {}, "max_text": {"text": 8, "pair": 6}, **fields})
    return build_preparer(data, 8, WordEncoder(), HideSecond(), training)


def test_a_pair() -> None:
    example = Example("a.jpg", jpeg(size=(20, 10)), "one two three", image_id=9)
    sample = preparer()("pair", 5, example, random.Random(0))
    assert (sample.name, sample.position, sample.image_id) == ("a.jpg", 5, 9)
    assert sample.pixels is not None and sample.pixels.shape == (3, 8, 8) and sample.pixels.dtype == np.uint8
    assert sample.patch_mask is not None and sample.patch_mask.sum() == 1
    assert sample.text_ids is not None and sample.text_ids.tolist() == [2, 4, 5, 5, 3]
    assert sample.text_targets is not None and sample.text_targets.tolist() == [-1, 5, -1, -1, -1]


def test_single_streams_ignore_the_rest() -> None:
    example = Example("a.jpg", jpeg(), "one two")
    image = preparer()("image", 0, example, random.Random(0))
    text = preparer()("text", 0, example, random.Random(0))
    assert image.text_ids is None and image.text_targets is None and image.pixels is not None
    assert text.pixels is None and text.patch_mask is None and text.text_ids is not None


@pytest.mark.parametrize(("stream", "longest"), [("text", 8), ("pair", 6)])
def test_a_long_text_is_cut_between_cls_and_sep(stream: StreamName, longest: int) -> None:
    example = Example("a", Image.new("RGB", (8, 8)), " ".join(["word"] * 30))
    ids = preparer()(stream, 0, example, random.Random(0)).text_ids
    assert ids is not None and len(ids) == longest
    assert ids[0] == 2 and ids[-1] == 3


def test_padding_tokens_are_appended_and_not_predicted() -> None:
    sample = preparer(pad_text_to=7)("text", 0, Example("a", text="one two"), random.Random(0))
    assert sample.text_ids is not None and sample.text_ids.tolist() == [2, 4, 5, 3, 0, 0, 0]
    assert sample.text_targets is not None and sample.text_targets.tolist() == [-1, 5, -1, -1, -1, -1, -1]


def test_only_training_images_are_augmented() -> None:
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    augment = {"image": {"crop_scale": [0.2, 0.5], "horizontal_flip": 0.5}}
    drawn = {
        training: {
            preparer(training, augment=augment)("image", 0, Example("a", picture), random.Random(seed)).pixels.tobytes()  # type: ignore[union-attr]
            for seed in range(5)
        }
        for training in (True, False)
    }
    assert len(drawn[True]) == 5
    assert len(drawn[False]) == 1


@pytest.mark.parametrize(
    ("stream", "example", "message"),
    [
        ("image", Example("x.jpg", b"no picture"), r"x\.jpg: "),
        ("image", Example("x.jpg", b""), r"x\.jpg: "),
        ("pair", Example("x.jpg", None, "words"), r"x\.jpg: has no image, which the pair stream needs"),
        ("pair", Example("x.jpg", jpeg(), ""), r"x\.jpg: has no text, which the pair stream needs"),
        ("text", Example("x:3", None, None), r"x:3: has no text, which the text stream needs"),
    ],
)
def test_a_broken_example_is_named(stream: StreamName, example: Example, message: str) -> None:
    with pytest.raises(DataError, match=message):
        preparer()(stream, 0, example, random.Random(0))
