"""What the end of a tokenizer's training leaves in `report/`: numbers and a grid of pictures."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from vlmoe_core.analysis.codes.measure import Measured, PixelError, measure
from vlmoe_core.analysis.codes.picture import feature_colours, grid
from vlmoe_core.analysis.routing.files import report_folder
from vlmoe_core.checkpoint.layout import RECIPE
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.data.loader import load
from vlmoe_core.data.naming import file_name
from vlmoe_core.data.stream import open_streams
from vlmoe_core.hf import is_hub
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import load_model_recipe
from vlmoe_core.tokenizers.codebook import Codebook, fit_codebook
from vlmoe_core.tokenizers.teachers.teacher import Teacher
from vlmoe_core.tokenizers.visual import unit_range
from vlmoe_core.tokenizers.vqkd import VQKD
from vlmoe_core.train.build import build_dataset
from vlmoe_core.train.fitting import fit_images
from vlmoe_core.train.trained import Trained, load_trained
from vlmoe_core.train.visual import tokenizer_in, trains_tokenizer

SCHEMA = 1
NUMBERS, PICTURE = "codes.json", "reconstructions.png"
PICTURES = 8
"""Images in the grid."""


@dataclass(frozen=True)
class _Parts:
    """What is compared: the tokenizer, whom it learned from, and the baseline."""

    tokenizer: VQKD
    teacher: Teacher
    codebook: Codebook | None
    """Null where no pixels are drawn."""
    fitted_on: int
    """Training images that the codebook saw."""


def report_on(run: Path) -> list[Path]:
    """Measure the tokenizer that a run trained on `data.eval`, in this process alone, and write the report.

    With the teacher `pixels` a k-means codebook of equal size is fitted on the run's training images and measured
    beside it.

    Returns:
        `codes.json` and `reconstructions.png`; nothing for other runs, and without held-out images.

    Raises VlmoeError where data or disk don't allow it.
    """
    recipe = load_model_recipe(resolve(run) / RECIPE)
    if not isinstance(recipe, Recipe) or not trains_tokenizer(recipe) or not recipe.data.eval.image:
        return []
    trained = load_trained(run)
    device = PartialState().device
    parts = _parts_of(trained, device)
    found = measure(parts.tokenizer, parts.teacher, parts.codebook, _held_out(trained), device)
    folder = report_folder(trained.path)
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / NUMBERS, folder / PICTURE
    numbers.write_text(json.dumps(_as_json(trained, parts, found), indent=2) + "\n", encoding="utf-8")
    grid(_columns(parts, found, _first(trained).to(device))).save(picture, optimize=True)
    return [numbers, picture]


def _parts_of(trained: Trained, device: torch.device) -> _Parts:
    tokenizer = tokenizer_in(trained.recipe, trained.objective.state_dict())
    assert isinstance(tokenizer, VQKD), "report_on asks for no other"
    teacher: Teacher = trained.objective.teacher  # type: ignore[assignment]
    codebook, images = _kmeans(trained.recipe) if tokenizer.draws else (None, 0)
    tokenizer.to(device)
    return _Parts(tokenizer, teacher, codebook.to(device) if codebook is not None else None, images)


def _kmeans(recipe: Recipe) -> tuple[Codebook, int]:
    """The codebook that masked modelling on the same images would have fitted, and the number of images that it saw."""
    asked = recipe.tokenizers.visual
    streams = open_streams(recipe.data, recipe.data.train, recipe.seed)
    images = list(fit_images(recipe, [streams["image"]]))
    codebook = fit_codebook(images, recipe.model.patch_size, asked.codebook_size, asked.iterations, recipe.seed)
    return codebook, len(images)


def _held_out(trained: Trained) -> Iterator[Tensor]:
    """The held-out images (I, C, H, W), uint8, batch by batch, as training evaluates on them."""
    recipe = trained.recipe
    dataset = build_dataset(recipe, recipe.data.eval, trained.tokenizers, training=False)
    for micro in load(dataset, range(dataset.num_micros), recipe.data):
        yield micro.batches["image"].pixels_ICHW


def _first(trained: Trained) -> Tensor:
    """The images of the grid."""
    found: list[Tensor] = []
    for pixels_ICHW in _held_out(trained):
        found.append(pixels_ICHW)
        if sum(map(len, found)) >= PICTURES:
            break
    return torch.cat(found)[:PICTURES]


@torch.no_grad()
def _columns(parts: _Parts, found: Measured, pixels_ICHW: Tensor) -> dict[str, Tensor]:
    """The columns of the grid, by their labels."""
    own = parts.tokenizer
    ids_IP = own.encode(pixels_ICHW)
    columns = {"original": unit_range(pixels_ICHW)}
    if parts.codebook is not None:
        columns[_label("k-means", found.kmeans)] = parts.codebook.decode(parts.codebook.encode(pixels_ICHW))
        return columns | {_label("VQ-KD", found.pixels): own.decode(ids_IP)}
    teacher_I3HW, told_I3HW = feature_colours(parts.teacher.features(pixels_ICHW), own.features(ids_IP))
    return columns | {"teacher": teacher_I3HW, f"VQ-KD, cos {found.cosine:.2f}": told_I3HW}


def _label(name: str, error: PixelError | None) -> str:
    return name if error is None else f"{name}, {error.psnr:.1f} dB"


def _as_json(trained: Trained, parts: _Parts, found: Measured) -> dict[str, Any]:
    """The numbers. They may be published, and then hold no path of this machine."""
    facts = asdict(found)
    if found.kmeans is not None:
        facts["kmeans"] |= {"fitted_on": parts.fitted_on}
    teacher = parts.tokenizer.shape.teacher.model
    about = {"schema": SCHEMA, "step": trained.step, "codebook_size": parts.tokenizer.codebook_size}
    return about | {"teacher": teacher if is_hub(teacher) else file_name(teacher)} | facts
