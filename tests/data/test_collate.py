"""Samples become a packed batch without padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.data.example import Sample


def sample(position: int, hidden: list[int] | None = None, length: int | None = None) -> Sample:
    """An image with hidden patches of 4, a text with that many tokens whose last but one is hidden, or both."""
    pixels = mask = ids = targets = None
    if hidden is not None:
        pixels = np.full((3, 4, 4), position, np.uint8)
        mask = np.isin(np.arange(4), hidden)
    if length is not None:
        ids = np.arange(length, dtype=np.int64) + 10 * position
        targets = np.full(length, -1, np.int64)
        targets[-2] = 5
    return Sample(f"sample {position}", position, position if hidden is not None else -1, pixels, mask, ids, targets)


def test_pairs() -> None:
    batch = collate("pair", [sample(4, [0, 3], 3), sample(7, [1], 5)], 4, 4)
    assert batch.fused
    assert batch.pixels_ICHW.shape == (2, 3, 4, 4) and batch.pixels_ICHW.dtype == torch.uint8
    assert batch.pixels_ICHW[:, 0, 0, 0].tolist() == [4, 7]
    assert batch.patch_mask_IP.tolist() == [[True, False, False, True], [False, True, False, False]]
    assert batch.image_ids.tolist() == [4, 7]
    assert batch.sequence_of_image.tolist() == [0, 1]
    assert batch.text_ids_T.tolist() == [40, 41, 42, 70, 71, 72, 73, 74]
    assert batch.text_targets_T.tolist() == [-1, 5, -1, -1, -1, -1, 5, -1]
    assert batch.text_positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.sequence_of_text.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert batch.example_of_sequence.tolist() == [0, 1]
    assert batch.positions.tolist() == [4, 7]
    assert (batch.longest_text, batch.num_masked_patches, batch.num_masked_words) == (5, 3, 2)


def test_single_inputs() -> None:
    images, texts = collate("image", [sample(2, [0])], 4, 4), collate("text", [sample(3, None, 4)], 4, 4)
    assert not images.fused and not texts.fused
    assert (images.num_images, images.text_ids_T.numel(), images.longest_text) == (1, 0, 0)
    assert (texts.num_images, texts.text_ids_T.tolist(), texts.longest_text) == (0, [30, 31, 32, 33], 4)
    assert (images.num_sequences, texts.num_sequences) == (1, 1)


def test_tokens_of_second_texts_are_marked() -> None:
    one, two = sample(1, None, 3), replace(sample(2, None, 5), second_text_at=3)
    batch = collate("text", [one, two], 4, 4)
    assert batch.second_text_T is not None and batch.second_text_T.dtype == torch.bool
    assert batch.second_text_T.tolist() == [False] * 3 + [False] * 3 + [True] * 2
    assert collate("text", [one], 4, 4).second_text_T is None


@pytest.mark.parametrize("stream", STREAMS)
def test_no_sample_gives_an_empty_batch_of_the_same_shapes_and_types(stream: StreamName) -> None:
    full = collate("pair", [sample(1, [0], 3)], 4, 4)
    empty = collate(stream, [], 4, 4)
    assert empty.num_sequences == empty.num_images == empty.num_masked_words == empty.num_masked_patches == 0
    for name in vars(full):
        there, here = getattr(full, name), getattr(empty, name)
        if isinstance(there, torch.Tensor):
            assert here.dtype == there.dtype, name
            assert here.shape == (0, *there.shape[1:]), name


def several(position: int, pictures: int, length: int, target: object = None) -> Sample:
    """A text and so many pictures, whose pixels are 10 x position + number."""
    first = sample(position, [], length)
    pixels = [np.full((3, 4, 4), 10 * position + n, np.uint8) for n in range(pictures)]
    return replace(
        first,
        pixels=pixels[0],
        more_pixels=tuple(pixels[1:]),
        target=None if target is None else np.array(target),
    )


def test_each_picture_of_an_example_is_a_sequence_with_the_text() -> None:
    batch = collate("pair", [several(4, 2, 3), several(7, 1, 2), several(9, 3, 2)], 4, 4)
    assert (batch.num_examples, batch.num_sequences, batch.num_images) == (3, 6, 6)
    assert batch.example_of_sequence.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.positions.tolist() == [4, 7, 9]
    assert batch.pixels_ICHW[:, 0, 0, 0].tolist() == [40, 41, 70, 90, 91, 92]
    assert batch.image_ids.tolist() == [4, 4, 7, 9, 9, 9]
    assert batch.sequence_of_image.tolist() == list(range(6))
    assert batch.text_ids_T.tolist() == [40, 41, 42, 40, 41, 42, 70, 71, 90, 91, 90, 91, 90, 91]
    assert batch.sequence_of_text.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert batch.text_positions_T.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 1]
    assert batch.patch_mask_IP.shape == (6, 4) and batch.longest_text == 3


@pytest.mark.parametrize(
    ("targets", "expected"),
    [([1, 0, 2], [1, 0, 2]), ([[0.3, 1.0], [0.0, 0.6]], [[0.3, 1.0], [0.0, 0.6]])],
    ids=["labels", "scores"],
)
def test_targets_are_one_row_an_example(targets: list[object], expected: list[object]) -> None:
    batch = collate("pair", [several(n, 2, 2, target) for n, target in enumerate(targets)], 4, 4)
    assert batch.targets is not None and batch.targets.tolist() == expected
    assert batch.to("cpu").targets is not None


@pytest.mark.parametrize("targets", [[None, None], [1, None]])
def test_a_batch_whose_targets_are_not_all_known_has_none(targets: list[object]) -> None:
    assert collate("pair", [several(n, 1, 2, target) for n, target in enumerate(targets)], 4, 4).targets is None
    assert collate("pair", [], 4, 4).targets is None
