import torch

from tests.tokenizers.vqkd_support import pictures
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.teachers.pixels import PixelTeacher


def test_features_are_the_pixels_of_each_patch_and_a_constant() -> None:
    pixels = pictures(2, size=8)
    teacher = PixelTeacher(4)
    features = teacher.features(pixels)
    assert features.shape == (2, 4, teacher.dim) == (2, 4, 49)
    assert TeacherConfig().width(4) == 49
    wanted = pixels[1, :, 4:, :4].flatten() / 127.5 - 1
    torch.testing.assert_close(features[1, 2, :-1], wanted)
    assert len(features[..., -1].unique()) == 1


def test_pixels_come_back_whatever_the_length() -> None:
    pixels = pictures(2, size=8)
    teacher = PixelTeacher(4)
    scale = torch.rand(2, 4, 1) + 0.5
    torch.testing.assert_close(teacher.images(teacher.features(pixels) * scale, (2, 2)), pixels / 255)


def test_a_feature_that_points_backwards_is_a_picture_all_the_same() -> None:
    drawn = PixelTeacher(4).images(-torch.ones(1, 4, 49), (2, 2))
    assert drawn.isfinite().all()
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
