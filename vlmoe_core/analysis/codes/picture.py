"""What the codes of a visual tokenizer tell of images, as a grid of pictures: a row for each image.

Axis letters: I images, P patches, O features, N patches of all images, C channels, H height, W width.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.data.contact_sheet import INK, default_font, drawable

TILE, GAP, LABEL, FONT = 128, 6, 24, 15
"""Pixels: a side of a picture, between pictures, of the line above them, of its letters."""
COLOURS = 256
TAIL = 0.02
"""Share of the patches at either end of a component that get the end of its colour."""


def grid(columns: Mapping[str, Tensor]) -> Image.Image:
    """Pictures with a label above each column.

    Args:
        columns: by their labels, (I, C, H, W) in [0, 1]; the first picture of each column is the first row.
    """
    rows = max(len(pictures) for pictures in columns.values())
    size = len(columns) * (TILE + GAP) + GAP, LABEL + rows * (TILE + GAP)
    sheet, font = Image.new("RGB", size, "white"), default_font(FONT)
    draw = ImageDraw.Draw(sheet)
    for column, (label, pictures_ICHW) in enumerate(columns.items()):
        left = GAP + column * (TILE + GAP)
        draw.text((left + TILE / 2, LABEL / 2), drawable(label, font), INK, font, anchor="mm")
        for row, picture_CHW in enumerate(pictures_ICHW):
            sheet.paste(_tile(picture_CHW), (left, LABEL + row * (TILE + GAP)))
    return sheet.quantize(COLOURS, dither=Image.Dither.NONE)


def _tile(picture_CHW: Tensor) -> Image.Image:
    pixels: NDArray[np.uint8] = (picture_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    whole = TILE % pixels.shape[0] == 0
    resampling = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((TILE, TILE), resampling)


def feature_colours(teacher_IPO: Tensor, told_IPO: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a square grid of patches as pictures (I, 3, rows, columns) in [0, 1]; equal colours are equal values.

    Red, green and blue are the first three principal components of the teacher's features, of length 1, in which both
    are drawn.
    """
    directions = [F.normalize(features_IPO.cpu().float(), dim=-1) for features_IPO in (teacher_IPO, told_IPO)]
    points_NO = directions[0].flatten(0, 1)
    mean_O = points_NO.mean(0)
    basis_O3 = torch.linalg.svd(points_NO - mean_O, full_matrices=False).Vh[:3].T
    places = [(one - mean_O) @ basis_O3 for one in directions]
    ends = places[0].flatten(0, 1).quantile(torch.tensor([TAIL, 1 - TAIL]), dim=0)
    span_3 = (ends[1] - ends[0]).clamp_min(1e-6)
    rows = round(teacher_IPO.shape[1] ** 0.5)
    teacher_I3HW, told_I3HW = (
        ((one - ends[0]) / span_3).clamp(0, 1).unflatten(1, (rows, rows)).permute(0, 3, 1, 2) for one in places
    )
    return teacher_I3HW, told_I3HW
