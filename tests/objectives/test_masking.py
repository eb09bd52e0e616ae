import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe_core.data.config import StreamName
from vlmoe_core.objectives.config import MaskConfig
from vlmoe_core.objectives.masking import Masking, _add_block, block_mask, num_masked

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = {PAD, UNK, CLS, SEP, MASK}
VOCAB = 40


def masking_of(grid: int = 14, **config: object) -> Masking:
    return Masking(MaskConfig.model_validate(config), grid, VOCAB, MASK, frozenset(SPECIAL))


@given(st.integers(0, 300), st.floats(0.01, 0.99))
def test_number_of_hidden_words(length: int, rate: float) -> None:
    count = num_masked(length, rate)
    if length == 0:
        assert count == 0
    elif length == 1:
        assert count == 1
    else:
        assert count == min(max(round(rate * length), 1), length - 1)


def test_number_of_hidden_words_by_hand() -> None:
    assert [num_masked(n, 0.15) for n in (0, 1, 2, 3, 10, 20, 126)] == [0, 1, 1, 1, 2, 3, 19]
    assert [num_masked(n, 0.5) for n in (2, 3, 4, 62)] == [1, 2, 2, 31]


@settings(max_examples=200)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=60), st.sampled_from(["text", "pair"]), st.integers(0, 2**32 - 1))
def test_hidden_words(ids: list[int], stream: StreamName, seed: int) -> None:
    corrupted, targets = masking_of().text(ids, stream, random.Random(seed))
    ordinary = [i for i, token in enumerate(ids) if token not in SPECIAL]
    hidden = [i for i, target in enumerate(targets) if target != -1]
    assert len(corrupted) == len(targets) == len(ids)
    assert len(hidden) == num_masked(len(ordinary), 0.5 if stream == "pair" else 0.15)
    assert set(hidden) <= set(ordinary)
    for i, token in enumerate(ids):
        if i in hidden:
            assert targets[i] == token
            assert corrupted[i] == MASK or corrupted[i] not in SPECIAL
        else:
            assert corrupted[i] == token
    assert masking_of().text(ids, stream, random.Random(seed)) == (corrupted, targets)


def test_the_caller_keeps_its_words() -> None:
    ids = list(range(5, 25))
    masking_of().text(ids, "pair", random.Random(0))
    assert ids == list(range(5, 25))


def replacements(**config: float) -> Counter[str]:
    """What becomes of the word 7, among many draws."""
    rng, masking = random.Random(1), masking_of(**config)
    found: Counter[str] = Counter()
    for _ in range(400):
        corrupted, targets = masking.text([CLS, *[7] * 60, SEP], "pair", rng)
        for word, target in zip(corrupted, targets, strict=True):
            if target != -1:
                found["mask" if word == MASK else "same" if word == 7 else "random"] += 1
    return found


def test_eight_in_ten_are_masked_one_random_one_kept() -> None:
    found = replacements()
    total = found.total()
    assert total == 400 * 30
    # Four standard deviations of a share of 0.8 of 12,000; one random word in 35 is the same by chance.
    assert found["mask"] / total == pytest.approx(0.8, abs=0.015)
    assert found["random"] / total == pytest.approx(0.1 * 34 / 35, abs=0.011)
    assert found["same"] / total == pytest.approx(0.1 + 0.1 / 35, abs=0.011)


def test_shares_are_those_of_the_config() -> None:
    assert set(replacements(mask_token=1.0, random_token=0.0)) == {"mask"}
    assert set(replacements(mask_token=0.0, random_token=0.0)) == {"same"}
    assert set(replacements(mask_token=0.0, random_token=1.0)) == {"random", "same"}
    with pytest.raises(ValueError, match=r"mask_token \(0\.8\) and random_token \(0\.3\) sum to more than 1"):
        masking_of(random_token=0.3)


def test_random_words_are_uniform_over_all_ordinary_words() -> None:
    rng, masking = random.Random(2), masking_of(mask_token=0.0, random_token=1.0)
    found: Counter[int] = Counter()
    for _ in range(600):
        found.update(w for w, t in zip(*masking.text([7] * 60, "pair", rng), strict=True) if t != -1)
    assert set(found) == set(range(5, VOCAB))
    mean = found.total() / 35
    assert all(abs(n - mean) < 5 * math.sqrt(mean) for n in found.values())


def test_every_place_is_equally_likely() -> None:
    rng, masking = random.Random(3), masking_of()
    found: Counter[int] = Counter()
    for _ in range(4000):
        _, targets = masking.text([CLS, *range(10, 30), SEP], "text", rng)
        found.update(i for i, t in enumerate(targets) if t != -1)
    assert set(found) == set(range(1, 21))
    assert all(abs(n - 600) < 5 * math.sqrt(600) for n in found.values())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.floats(0, 1), st.integers(1, 40), st.floats(0.1, 1), st.integers(0, 2**32 - 1))
def test_exactly_as_many_patches_as_asked(grid: int, share: float, min_block: int, aspect: float, seed: int) -> None:
    count = round(share * grid**2)
    mask = block_mask(grid, count, min_block, aspect, random.Random(seed))
    assert mask.shape == (grid**2,) and mask.dtype == np.bool_
    assert mask.sum() == count
    assert np.array_equal(mask, block_mask(grid, count, min_block, aspect, random.Random(seed)))


@pytest.mark.parametrize(("min_aspect", "missing"), [(0.3, 75), (0.3, 20), (0.8, 75)])
def test_a_block_has_the_area_and_aspect_of_beit(min_aspect: float, missing: int) -> None:
    rng, areas, flattest = random.Random(4), [], 1.0
    for _ in range(1500):
        mask = np.zeros((14, 14), dtype=np.bool_)
        assert _add_block(mask, missing, 16, min_aspect, rng)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = len(rows), len(columns)
        assert mask.sum() == height * width, "a block is a full rectangle"
        assert height == np.ptp(rows) + 1 and width == np.ptp(columns) + 1
        assert height < 14 and width < 14
        assert height * width <= missing
        # Height and width were rounded: some real area and aspect within the bounds lead to them.
        assert (height + 0.5) * (width + 0.5) >= 16
        assert (height + 0.5) / (width - 0.5) >= min_aspect
        assert (height - 0.5) / (width + 0.5) <= 1 / min_aspect
        areas.append(height * width)
        flattest = min(flattest, height / width)
    assert flattest < min_aspect * 1.3, "flat blocks do occur"
    if missing == 75:
        assert min(areas) < 20 and max(areas) > 70
        assert 35 < np.mean(areas) < 50


def test_blocks_stand_anywhere() -> None:
    rng = random.Random(5)
    total = np.sum([block_mask(14, 75, 16, 0.3, rng) for _ in range(600)], axis=0).reshape(14, 14)
    assert total.min() > 0
    for turned in (total[::-1], total[:, ::-1], total.T):
        assert np.abs(turned - total).max() < 90


def neighbours(mask: np.ndarray) -> float:
    """Share of the hidden patches' right and lower neighbours that are hidden too."""
    grid = math.isqrt(len(mask))
    plane = mask.reshape(grid, grid)
    pairs = (plane[1:] & plane[:-1]).sum() + (plane[:, 1:] & plane[:, :-1]).sum()
    return float(pairs / (2 * plane.sum()))


def test_masks_are_made_of_blocks() -> None:
    rng = random.Random(6)
    blocks = np.mean([neighbours(block_mask(14, 75, 16, 0.3, rng)) for _ in range(100)])
    flat = np.arange(196)
    scattered = np.mean([neighbours(np.isin(flat, rng.sample(range(196), 75))) for _ in range(100)])
    assert scattered < 0.4 and blocks > 0.7


@pytest.mark.parametrize(("grid", "smallest"), [(14, 16), (24, 47), (30, 73), (8, 5), (4, 1), (2, 1)])
def test_the_smallest_block_scales_with_the_grid(grid: int, smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int, float]] = []

    def spy(grid: int, count: int, min_block: int, min_aspect: float, rng: random.Random) -> np.ndarray:
        seen.append((grid, count, min_block, min_aspect))
        return np.zeros(grid * grid, dtype=np.bool_)

    monkeypatch.setattr("vlmoe_core.objectives.masking.block_mask", spy)
    masking_of(grid).image("image", random.Random(0))
    masking_of(grid, min_block=3, min_aspect=0.5).image("image", random.Random(0))
    count = round(0.4 * grid**2)
    assert seen == [(grid, count, smallest, 0.3), (grid, count, 3, 0.5)]


def test_rates_of_the_streams_and_the_fixed_count() -> None:
    rng = random.Random(0)
    masking = masking_of(image=0.25, pair_image=0.6)
    assert masking.image("image", rng).sum() == 49
    assert masking.image("pair", rng).sum() == round(0.6 * 196)
    assert masking_of().image("image", rng).sum() == 78
    fixed = masking_of(image_count=75)
    assert {int(fixed.image(stream, rng).sum()) for stream in ("image", "pair")} == {75}


def test_special_ids_are_those_of_the_tokenizer() -> None:
    class Encoder:
        vocab_size, fingerprint = 60, ""
        pad_id, unk_id, cls_id, sep_id, mask_id = 3, 9, 27, 31, 8

        def encode(self, text: str) -> list[int]:
            return []

    masking = Masking.of(MaskConfig(mask_token=0, random_token=1), 4, Encoder())
    corrupted, targets = masking.text([27, *range(40, 60), 31, 3, 3], "pair", random.Random(0))
    assert sum(t != -1 for t in targets) == 10
    assert corrupted[0] == 27 and corrupted[-3:] == [31, 3, 3]
    assert not {w for w, t in zip(corrupted, targets, strict=True) if t != -1} & {3, 9, 27, 31, 8}
