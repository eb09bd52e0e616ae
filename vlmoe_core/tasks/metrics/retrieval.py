"""Retrieval both ways: ranks from features or from re-ranked candidates, and within 1K folds.

An item is ranked before another if its score is higher, or equal with a lower index. Nothing else decides, and scores
from features are exact sums, so neither the chunk, the batch nor the machine changes a rank.

Shapes: N images, M texts, D width of the features, Q queries, I items, k candidates of a query.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmoe_core.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CUTS = (1, 5, 10)
CHUNK = 128
"""Queries whose scores are held at once: about 25 bytes an item, so 80 MB for 128 queries and 25,000 items."""
GRID = 2.0**26
"""Steps of a unit feature. Products of two are multiples of 2^-52, and so are all their sums: float64 holds each."""
UNRANKED = -100.0
"""Score of what is no candidate (VLMo)."""


@dataclass(frozen=True)
class Ranks:
    """Place of the best own item of every query, 0 the first."""

    image_to_text: Ints
    """(N,) of the best own text of each image."""
    text_to_image: Ints
    """(M,) of the image of each text."""


@dataclass(frozen=True)
class Candidates:
    """The k best items of every query, best first."""

    items: Ints
    """(Q, k)."""
    scores: Floats
    """(Q, k)."""


def feature_ranks(
    image_features: ArrayLike, text_features: ArrayLike, image_of_text: ArrayLike, chunk: int = CHUNK
) -> Ranks:
    """Ranks by the dot product of image features (N, D) and text features (M, D), unit vectors.

    `image_of_text` (M,) is the number of each text's image. Memory: the features as float64 and `chunk` rows of scores.
    DataError if shapes don't fit, a feature is not finite, or an image has no text.
    """
    images, texts = on_grid(image_features), on_grid(text_features)
    image_N, image_M = _groups(len(images), len(texts), image_of_text)
    return Ranks(
        _ranks(lambda rows: images[rows] @ texts.T, image_N, image_M, chunk),
        _ranks(lambda rows: texts[rows] @ images.T, image_M, image_N, chunk),
    )


def candidate_ranks(texts: Candidates, images: Candidates, image_of_text: ArrayLike, chunk: int = CHUNK) -> Ranks:
    """Ranks after re-ranking as VLMo does: `texts` of each image (N, k), `images` of each text (M, k).

    Their scores are the new ones, ITC + ITM match logit; every other item has -100.
    """
    image_N, image_M = _groups(len(texts.items), len(images.items), image_of_text)
    return Ranks(
        _ranks(lambda rows: _spread(texts, rows, len(image_M)), image_N, image_M, chunk),
        _ranks(lambda rows: _spread(images, rows, len(image_N)), image_M, image_N, chunk),
    )


def best_items(queries: ArrayLike, items: ArrayLike, k: int, chunk: int = CHUNK) -> Candidates:
    """The k items (I, D) of the highest dot product with each query (Q, D); all items if there are fewer than k."""
    query_QD, item_ID = on_grid(queries), on_grid(items)
    k = min(k, len(item_ID))
    found = np.empty((len(query_QD), k), dtype=np.int64)
    scores = np.empty((len(query_QD), k))
    for rows in _chunks(len(query_QD), chunk):
        score = query_QD[rows] @ item_ID.T
        found[rows] = _best(score, k)
        scores[rows] = np.take_along_axis(score, found[rows], axis=1)
    return Candidates(found, scores)


def on_grid(features: ArrayLike) -> Floats:
    """Features (Q, D) as float64, rounded to multiples of 2^-26: finer than float32, and dot products are exact.

    Exact for unit vectors; longer ones only lose that sums don't depend on their order. DataError if one is not finite.
    """
    return np.round(_finite(features, "features") * GRID) / GRID


def fold_ranks(
    image_features: ArrayLike, text_features: ArrayLike, image_of_text: ArrayLike, size: int = 1000, chunk: int = CHUNK
) -> list[Ranks]:
    """Ranks within folds of `size` consecutive images and their texts: five for COCO 1K.

    DataError if the images don't fill whole folds, or as in `feature_ranks`.
    """
    images, texts, image_M = np.asarray(image_features), np.asarray(text_features), np.asarray(image_of_text)
    if not len(images) or len(images) % size:
        raise DataError(f"{len(images)} images don't make whole folds of {size}: evaluate them all, or choose the size")
    _groups(len(images), len(texts), image_M)
    folds = []
    for start in range(0, len(images), size):
        own = np.flatnonzero((image_M >= start) & (image_M < start + size))
        folds.append(feature_ranks(images[start : start + size], texts[own], image_M[own] - start, chunk))
    return folds


def _ranks(score_rows: Callable[[slice], Floats], group_Q: Ints, group_I: Ints, chunk: int) -> Ints:
    """Place (Q,) of each query's best own item; own items are those of its group."""
    index_I = np.arange(len(group_I))
    ranks = np.empty(len(group_Q), dtype=np.int64)
    for rows in _chunks(len(group_Q), chunk):
        scores = score_rows(rows)
        own = group_Q[rows, None] == group_I
        best = np.where(own, scores, -np.inf).argmax(axis=1)[:, None]
        score = np.take_along_axis(scores, best, axis=1)
        before = (scores > score) | ((scores == score) & (index_I < best))
        ranks[rows] = np.count_nonzero(before, axis=1)
    return ranks


def _best(scores: Floats, k: int) -> Ints:
    """The k best items (Q, k) of rows of scores (Q, I), best first, the lower index first among equals."""
    if not k:
        return np.empty((len(scores), 0), dtype=np.int64)
    least = np.partition(scores, -k, axis=1)[:, -k]
    found = np.empty((len(scores), k), dtype=np.int64)
    for row, score in enumerate(scores):
        items = np.flatnonzero(score >= least[row])
        found[row] = items[np.argsort(-score[items], kind="stable")[:k]]
    return found


def _spread(candidates: Candidates, rows: slice, items: int) -> Floats:
    chosen = candidates.items[rows]
    scores = np.full((len(chosen), items), UNRANKED)
    np.put_along_axis(scores, chosen, _finite(candidates.scores[rows], "scores"), axis=1)
    return scores


def _finite(values: ArrayLike, name: str) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 2:
        raise DataError(f"{name} must have two dimensions, not the shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise DataError(f"{name} hold inf or nan: nothing can be ranked by them")
    return numbers


def _groups(images: int, texts: int, image_of_text: ArrayLike) -> tuple[Ints, Ints]:
    """Number of the image of each image (N,) and of each text (M,), checked: own items share it."""
    image_N, image_M = np.arange(images), np.asarray(image_of_text, dtype=np.int64)
    if image_M.shape != (texts,):
        raise DataError(f"{texts} texts, but image_of_text has the shape {image_M.shape}: one image for each text")
    outside = image_M[(image_M < 0) | (image_M >= images)]
    if len(outside):
        raise DataError(f"a text belongs to image {outside[0]}, but there are {images} images, counted from 0")
    alone = np.setdiff1d(image_N, image_M)
    if len(alone):
        raise DataError(f"image {alone[0]} has no text ({len(alone)} such images): it can't be retrieved, leave it out")
    return image_N, image_M


def _chunks(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, count)) for start in range(0, count, chunk))
