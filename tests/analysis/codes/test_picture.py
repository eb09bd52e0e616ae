"""The grid of pictures."""

import numpy as np
import torch

from vlmoe_core.analysis.codes.picture import GAP, LABEL, TILE, feature_colours, grid

RED, BLUE = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])


def flat(colour: torch.Tensor, size: int) -> torch.Tensor:
    return colour[:, None, None].expand(3, size, size)


def test_each_picture_has_its_place_and_each_column_its_label() -> None:
    black = torch.zeros(2, 3, 16, 16)
    left = torch.stack([flat(RED, 24), flat(BLUE, 24)])
    sheet = np.asarray(grid({"one": left, "two": black}).convert("RGB"))
    assert sheet.shape == (LABEL + 2 * (TILE + GAP), GAP + 2 * (TILE + GAP), 3)
    tiles = {
        (row, column): sheet[LABEL + row * (TILE + GAP) :, GAP + column * (TILE + GAP) :][:TILE, :TILE]
        for row in range(2)
        for column in range(2)
    }
    assert (tiles[0, 0] == [255, 0, 0]).all() and (tiles[1, 0] == [0, 0, 255]).all()
    assert (tiles[0, 1] == 0).all() and (tiles[1, 1] == 0).all()
    labels = [sheet[:LABEL, GAP + column * (TILE + GAP) :][:, :TILE] for column in range(2)]
    assert all((label < 128).any() for label in labels) and not np.array_equal(*labels)


def test_colours_follow_the_first_component_of_the_teacher() -> None:
    torch.manual_seed(0)
    place_IP = torch.linspace(-1, 1, 32).view(2, 16)
    axes_3O = torch.linalg.qr(torch.randn(8, 8)).Q[:3]
    teacher_IPO = axes_3O[0] + place_IP[..., None] * axes_3O[1] + 0.01 * torch.randn(2, 16, 8)
    same_I3HW, told_I3HW = feature_colours(teacher_IPO, 7 * teacher_IPO)
    assert same_I3HW.shape == (2, 3, 4, 4)
    assert torch.allclose(same_I3HW, told_I3HW, atol=1e-5)  # the length of features says nothing
    red = same_I3HW[:, 0].flatten()
    steps = red.diff()
    assert (steps >= -0.05).all() or (steps <= 0.05).all()
    assert red.max() == 1 and red.min() == 0


def test_features_unlike_the_teachers_have_other_colours() -> None:
    torch.manual_seed(0)
    teacher_IPO = torch.randn(2, 16, 8)
    same_I3HW, told_I3HW = feature_colours(teacher_IPO, teacher_IPO.flip(1))
    assert torch.allclose(same_I3HW.flatten(2), told_I3HW.flatten(2).flip(2), atol=1e-5)
    assert not torch.allclose(same_I3HW, told_I3HW, atol=0.1)
