"""The report at the end of a tokenizer's training."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.analysis.codes.support import CODES, tokenizer_run
from tests.train.support import metrics
from vlmoe_core.analysis.codes.files import report_on
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.data.stream import open_streams
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.tokenizers.codebook import fit_codebook


def test_the_numbers_are_those_of_the_last_evaluation(tokens: Path) -> None:
    numbers, picture = report_on(tokens)
    assert (numbers, picture) == (tokens / "report" / "codes.json", tokens / "report" / "reconstructions.png")
    found = json.loads(numbers.read_text())
    last = [line for line in metrics(tokens) if line["split"] == "eval"][-1]
    assert (found["step"], found["images"], found["codebook_size"], found["teacher"]) == (2, 10, CODES, "pixels")
    assert found["use"]["used"] == last["codes/used"]
    assert found["use"]["perplexity"] == pytest.approx(last["codes/perplexity"])
    assert found["pixels"]["mse"] == pytest.approx(last["codes/pixel_error"], rel=1e-4)
    assert found["cosine"] == pytest.approx(1 - last["loss/teacher"], abs=1e-5)
    assert str(tokens) not in numbers.read_text()


def test_k_means_is_fitted_on_training_images_and_measured_on_held_out_ones(tokens: Path) -> None:
    recipe = load_recipe(str(tokens / "recipe.yaml")).recipe
    transform = ImageTransform(16, None, recipe.data.max_pixels)

    def images(split: str, count: int, seed: int) -> list[np.ndarray]:
        stream = open_streams(recipe.data, getattr(recipe.data, split), seed)["image"]
        pictures = [stream[place].image for place in range(count)]
        return [transform(one, random.Random(0)) for one in pictures if one is not None]

    codebook = fit_codebook(images("train", 8, recipe.seed), 4, CODES, 3, recipe.seed)
    held_out = torch.from_numpy(np.stack(images("eval", 10, 0)))
    drawn = codebook.decode(codebook.encode(held_out))
    found = json.loads(report_on(tokens)[0].read_text())["kmeans"]
    assert found["fitted_on"] == 8
    assert found["mse"] == pytest.approx(float((drawn - held_out / 255).square().mean()), rel=1e-5)


def test_the_grid_has_three_columns_and_is_small(tokens: Path) -> None:
    picture = report_on(tokens)[1]
    with Image.open(picture) as opened:
        assert opened.size == (6 + 3 * 134, 24 + 8 * 134)
    assert picture.stat().st_size < 400_000


def test_other_runs_have_none(run_folder: Path, tmp_path: Path) -> None:
    assert report_on(run_folder) == []
    assert report_on(tokenizer_run(tmp_path, "train.steps=1", "data.eval.image=[]")) == []
