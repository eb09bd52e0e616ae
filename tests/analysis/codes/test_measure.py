"""Figures of a tokenizer against plain loops."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.analysis.codes.support import CODES, random_images, random_tokenizer
from vlmoe_core.analysis.codes.measure import CodeShare, measure, pixel_error, use_of
from vlmoe_core.tokenizers.codebook import fit_codebook
from vlmoe_core.tokenizers.teachers.pixels import PixelTeacher

CPU = torch.device("cpu")


def test_use_of_codes_by_hand() -> None:
    use = use_of(torch.tensor([2, 0, 5, 1, 0, 2]), shown=2)
    shares = [0.2, 0.5, 0.1, 0.2]
    assert use.used == 4 / 6
    assert use.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert use.most == (CodeShare(2, 0.5), CodeShare(0, 0.2))
    assert use.least == (CodeShare(4, 0.0), CodeShare(1, 0.0))


def test_codes_of_equal_frequency_have_their_number_as_perplexity() -> None:
    assert use_of(torch.full((7,), 3)).perplexity == pytest.approx(7)


def test_psnr() -> None:
    assert pixel_error(0.01).psnr == pytest.approx(20) and pixel_error(0.0).psnr == 100


def test_the_figures_equal_those_of_loops_over_images_and_patches() -> None:
    images, own = random_images(7), random_tokenizer()
    codebook = fit_codebook(images[:5], 4, CODES, 3, seed=0)
    teacher = PixelTeacher(4)
    found = measure(own, teacher, codebook, images.split([3, 3, 1]), CPU)
    assert found.images == 7

    counts: Counter[int] = Counter()
    cosines, errors = [], {"own": [], "codebook": []}  # type: ignore[var-annotated]
    for image in images:
        ids = own.encode(image[None])
        counts.update(ids[0].tolist())
        wanted, told = teacher.features(image[None])[0].numpy(), own.features(ids)[0].numpy()
        cosines += [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(wanted, told, strict=True)]
        for name, one in (("own", own), ("codebook", codebook)):
            drawn = one.decode(one.encode(image[None]))[0].double().numpy()
            errors[name].append(float(((drawn - image.double().numpy() / 255) ** 2).mean()))
    assert found.use.used == len(counts) / CODES and len(counts) > 1
    assert found.use.most[0].code == max(counts, key=lambda code: (counts[code], -code))
    assert found.use.most[0].share == max(counts.values()) / (7 * 16)
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found.pixels is not None and found.kmeans is not None
    assert found.pixels.mse == pytest.approx(np.mean(errors["own"]), rel=1e-5)
    assert found.kmeans.mse == pytest.approx(np.mean(errors["codebook"]), rel=1e-5)
    assert found.nearer == np.mean(np.array(errors["own"]) < np.array(errors["codebook"]))
    assert found.kmeans.mse < found.pixels.mse  # one is fitted, the other drawn at random
