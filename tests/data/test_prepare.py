"""From an example to a sample: lengths, padding, and errors that name the example."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.data.files_support import WordEncoder, jpeg
from vlmoe_core.data.config import DataConfig, StreamName
from vlmoe_core.data.example import Example, Sample
from vlmoe_core.data.joining import shares
from vlmoe_core.data.prepare import NothingHidden, Preparer, build_preparer
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


class Spelling:
    """Token ids that tell which word they stand for, and of which length."""

    vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id = 50, 0, 1, 2, 3, 4
    fingerprint = "spelling"

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def task_preparer(longest: int = 8, **fields: Any) -> Preparer:
    data = DataConfig.model_validate({"train": {}, "max_text": {"text": longest, "pair": longest}})
    return build_preparer(data, 8, Spelling(), NothingHidden(4), training=False, **fields)


def sample_of(example: Example, longest: int = 8) -> Sample:
    return task_preparer(longest)("text", 0, example, random.Random(0))


def ids_of(example: Example, longest: int = 8) -> list[int]:
    sample = sample_of(example, longest)
    assert sample.text_ids is not None and sample.text_targets is not None
    assert set(sample.text_targets.tolist()) == {-1}
    return sample.text_ids.tolist()  # type: ignore[no-any-return]


def test_two_sentences_stand_with_a_separator_between_them() -> None:
    example = Example("a", text="10 11", second_text="20 21 22")
    assert ids_of(example, 20) == [2, 10, 11, 3, 20, 21, 22, 3]


@pytest.mark.parametrize(("longest", "second_at"), [(20, 4), (7, 4), (6, 3), (5, 3)])
def test_a_sample_tells_where_its_second_text_begins(longest: int, second_at: int) -> None:
    made = sample_of(Example("a", text="10 11", second_text="20 21 22"), longest)
    assert made.second_text_at == second_at
    assert made.text_ids is not None and made.text_ids[second_at - 1] == 3
    assert sample_of(Example("a", text="10 11"), longest).second_text_at is None


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ("10 11 12 13 14 15", "20 21", [2, 10, 11, 12, 3, 20, 21, 3]),
        ("10 11", "20 21 22 23 24 25", [2, 10, 11, 3, 20, 21, 22, 3]),
        ("10 11 12 13 14 15", "20 21 22 23 24 25", [2, 10, 11, 3, 20, 21, 22, 3]),
        ("10 11 12", "20 21", [2, 10, 11, 12, 3, 20, 21, 3]),
    ],
    ids=["first is longer", "second is longer", "both", "both fit"],
)
def test_two_sentences_are_cut_so_that_the_shorter_one_stays(first: str, second: str, kept: list[int]) -> None:
    assert ids_of(Example("a", text=first, second_text=second)) == kept


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_shares_fill_the_room_and_cut_the_longer_text_first(first: int, second: int, room: int) -> None:
    one, other = shares(first, second, room)
    assert 0 <= one <= first and 0 <= other <= second
    assert one + other == min(room, first + second)
    if one < first and other < second:  # both were cut: alike
        assert abs(one - other) <= 1
    elif one < first:
        assert one >= other or one + 1 == other
    elif other < second:
        assert other >= one


@pytest.mark.parametrize("longest", [3, 4, 5])
def test_the_shortest_lengths_still_hold_the_special_tokens(longest: int) -> None:
    ids = ids_of(Example("a", text="10 11", second_text="20 21"), longest)
    assert len(ids) == longest and ids[0] == 2 and ids[-1] == 3 and ids.count(3) == 2


def test_stored_token_ids_are_taken_as_they_are() -> None:
    assert ids_of(Example("a", text_ids=(7, 9, 49))) == [2, 7, 9, 49, 3]
    assert ids_of(Example("a", text_ids=tuple(range(5, 30)))) == [2, *range(5, 11), 3]


@pytest.mark.parametrize("wrong", [50, -1])
def test_a_stored_id_that_the_tokenizer_lacks_is_named(wrong: int) -> None:
    with pytest.raises(
        DataError, match=rf"^vqa\.jsonl:3: token id {wrong} is not in the text tokenizer's 0\.\.49; load"
    ):
        ids_of(Example("vqa.jsonl:3", text_ids=(7, wrong)))


def test_several_pictures_are_all_decoded() -> None:
    example = Example("a", jpeg("red"), "10", more_images=(jpeg("blue"), Image.new("RGB", (4, 4), "lime")))
    sample = task_preparer()("pair", 0, example, random.Random(0))
    assert sample.pixels is not None and sample.pixels[:, 0, 0].argmax() == 0
    assert [picture.shape for picture in sample.more_pixels] == [(3, 8, 8)] * 2
    assert [int(picture[:, 0, 0].argmax()) for picture in sample.more_pixels] == [2, 1]
    assert sample.patch_mask is not None and not sample.patch_mask.any()


def test_a_second_picture_that_is_broken_names_the_example() -> None:
    example = Example("dev.json:4", jpeg(), "10", more_images=(b"torn",))
    with pytest.raises(DataError, match=r"^dev\.json:4: "):
        task_preparer()("pair", 0, example, random.Random(0))


def test_the_target_is_the_tasks_and_its_error_names_the_example() -> None:
    def target(example: Example) -> NDArray[np.generic]:
        if example.text == "11":
            raise DataError("the label 'cat' is not one of the model's 2")
        return np.array(5)

    prepared = task_preparer(target=target)
    assert prepared("text", 0, Example("a", text="10"), random.Random(0)).target == 5
    assert task_preparer()("text", 0, Example("a", text="10"), random.Random(0)).target is None
    with pytest.raises(DataError, match=r"^dev\.tsv:9: the label 'cat' is not one of the model's 2$"):
        prepared("text", 0, Example("dev.tsv:9", text="11"), random.Random(0))
