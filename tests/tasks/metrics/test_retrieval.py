import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe_core.errors import DataError
from vlmoe_core.tasks.metrics.retrieval import (
    Candidates,
    best_items,
    candidate_ranks,
    feature_ranks,
    fold_ranks,
    on_grid,
)


def place(scores, own):
    """Items sorted by the stated rule, then the place of the first own one."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
    return min(order.index(item) for item in own)


def brute(scores, image_of_text):
    """Ranks of a matrix (N, M) given as lists."""
    by_text = [[row[text] for row in scores] for text in range(len(image_of_text))]
    own = [[text for text, image in enumerate(image_of_text) if image == i] for i in range(len(scores))]
    return (
        [place(row, texts) for row, texts in zip(scores, own, strict=True)],
        [place(column, [image]) for column, image in zip(by_text, image_of_text, strict=True)],
    )


def lists(ranks):
    return ranks.image_to_text.tolist(), ranks.text_to_image.tolist()


def unit(rng, count, width=16):
    features = rng.normal(size=(count, width)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@st.composite
def worlds(draw):
    """Images, texts, and features of few values, so that ties are common."""
    images = draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=6))
    image_of_text = draw(st.permutations([*range(images), *extra]))
    value = st.sampled_from([-0.5, 0.0, 0.1, 0.5])

    def features(count):
        return draw(st.lists(st.lists(value, min_size=3, max_size=3), min_size=count, max_size=count))

    return features(images), features(len(image_of_text)), image_of_text


def exact_scores(images, texts):
    return [
        [sum(Fraction(round(a * 2**26) * round(b * 2**26)) for a, b in zip(i, t, strict=True)) for t in texts]
        for i in images
    ]


@given(worlds(), st.integers(1, 4))
def test_feature_ranks_by_sorting(world, chunk):
    images, texts, image_of_text = world
    expected = brute(exact_scores(images, texts), image_of_text)
    assert lists(feature_ranks(images, texts, image_of_text, chunk)) == expected


@given(worlds(), st.integers(1, 7), st.integers(1, 4), st.data())
def test_candidates_are_re_ranked_as_in_vlmo(world, k, chunk, data):
    images, texts, image_of_text = world
    to_text, to_image = best_items(images, texts, k, chunk), best_items(texts, images, k, chunk)
    sums = exact_scores(images, texts)
    order = [sorted(range(len(texts)), key=lambda text: (-row[text], text))[:k] for row in sums]
    assert to_text.items.tolist() == order

    def judged(candidates):
        flat = st.lists(
            st.sampled_from([-3.0, 0.0, 2.0]), min_size=candidates.items.size, max_size=candidates.items.size
        )
        match = np.array(data.draw(flat)).reshape(candidates.items.shape)
        return Candidates(candidates.items, candidates.scores + match)

    def dense(candidates, count):
        rows = [[-100.0] * count for _ in candidates.items]
        for row, items, scores in zip(rows, candidates.items, candidates.scores, strict=True):
            for item, score in zip(items, scores, strict=True):
                row[item] = score
        return rows

    to_text, to_image = judged(to_text), judged(to_image)
    own = [[text for text, image in enumerate(image_of_text) if image == i] for i in range(len(images))]
    expected = (
        [place(row, texts_of) for row, texts_of in zip(dense(to_text, len(texts)), own, strict=True)],
        [place(row, [image]) for row, image in zip(dense(to_image, len(images)), image_of_text, strict=True)],
    )
    assert lists(candidate_ranks(to_text, to_image, image_of_text, chunk)) == expected


def test_ties_go_to_the_lower_index():
    ranks = feature_ranks(np.zeros((3, 4)), np.zeros((6, 4)), [2, 2, 1, 1, 0, 0])
    assert lists(ranks) == ([4, 2, 0], [2, 2, 1, 1, 0, 0])


def test_ranks_by_hand():
    texts = [[0.9, 0.95], [0.1, 0.3], [0.8, 0.1], [0.2, 0.2]]  # the scores of the two images
    assert lists(feature_ranks(np.eye(2), texts, [0, 0, 1, 1])) == ([0, 2], [1, 1, 1, 1])


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([1, 7, 64, 1000]))
def test_the_chunk_changes_nothing_even_for_equal_features(seed, chunk):
    rng = np.random.default_rng(seed)
    images, texts = unit(rng, 60, 96), unit(rng, 130, 96)
    images[1::3], texts[2::4] = images[0], texts[0]
    image_of_text = np.concatenate((rng.permutation(60), rng.integers(0, 60, size=70)))
    image_steps, text_steps = (np.rint(values.astype(float) * 2**26).astype(np.int64) for values in (images, texts))
    expected = brute((image_steps @ text_steps.T).tolist(), image_of_text.tolist())
    assert lists(feature_ranks(images, texts, image_of_text, chunk)) == expected


def test_scores_are_exact_sums():
    rng = np.random.default_rng(0)
    images, texts = unit(rng, 20, 256), unit(rng, 30, 256)
    steps = [np.rint(values.astype(float) * 2**26).astype(np.int64) for values in (images, texts)]
    assert np.array_equal(on_grid(images) @ on_grid(texts).T * 2**52, steps[0] @ steps[1].T)
    assert np.abs(on_grid(images) - images).max() <= 2**-27


def test_folds_are_runs_of_images():
    rng = np.random.default_rng(0)
    images, texts, image_of_text = (
        unit(rng, 12),
        unit(rng, 40),
        np.concatenate((np.arange(12), rng.integers(0, 12, 28))),
    )
    folds = fold_ranks(images, texts, image_of_text, size=4)
    assert len(folds) == 3
    for fold, ranks in enumerate(folds):
        own = [text for text in range(40) if image_of_text[text] // 4 == fold]
        scores = (images[4 * fold : 4 * fold + 4].astype(float) @ texts[own].T.astype(float)).tolist()
        assert lists(ranks) == brute(scores, [int(image_of_text[text]) - 4 * fold for text in own])
    with pytest.raises(DataError, match="12 images don't make whole folds of 5"):
        fold_ranks(images, texts, image_of_text, size=5)


def test_memory_follows_the_chunk():
    rng = np.random.default_rng(0)
    images, texts = unit(rng, 600), unit(rng, 3000)
    tracemalloc.start()
    feature_ranks(images, texts, np.arange(3000) % 600, chunk=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * 3000 * 8 / 2


@pytest.mark.parametrize(
    ("images", "texts", "image_of_text", "message"),
    [
        (2, 3, [0, 1], r"3 texts, but image_of_text has the shape \(2,\)"),
        (2, 3, [0, 1, 2], "a text belongs to image 2, but there are 2 images"),
        (2, 3, [0, 1, -1], "a text belongs to image -1"),
        (3, 3, [0, 2, 0], "image 1 has no text"),
    ],
)
def test_texts_without_their_image_are_refused(images, texts, image_of_text, message):
    with pytest.raises(DataError, match=message):
        feature_ranks(np.ones((images, 4)), np.ones((texts, 4)), image_of_text)


def test_features_that_rank_nothing_are_refused():
    broken = np.ones((2, 4))
    broken[1, 2] = np.nan
    with pytest.raises(DataError, match="inf or nan"):
        feature_ranks(broken, np.ones((2, 4)), [0, 1])
    with pytest.raises(DataError, match=r"the shape \(4,\)"):
        feature_ranks(np.ones(4), np.ones((2, 4)), [0, 1])
    with pytest.raises(DataError, match="inf or nan"):
        candidate_ranks(*[Candidates(np.array([[0]]), np.array([[np.inf]]))] * 2, [0])
