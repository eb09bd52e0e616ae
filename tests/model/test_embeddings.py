from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.model.support import VOCAB, batch_of, config_of, randomise
from vlmoe_core.model.embeddings import Embeddings, resize_positions
from vlmoe_core.model.encoder import Encoder


def embed(embeddings: Embeddings, batch: object) -> torch.Tensor:
    x: torch.Tensor = embeddings(batch.pixels_ICHW, batch.patch_mask_IP, batch.text_ids_T, batch.text_positions_T)  # type: ignore[attr-defined]
    return x


def test_tokens_of_a_pair_by_hand() -> None:
    config = config_of()
    embeddings = Embeddings(config, VOCAB).double()
    randomise(embeddings)
    batch = batch_of("pair", [5, 3], config)
    image, text, kind = embeddings.image, embeddings.text, embeddings.kind
    wanted = []
    for i in range(2):
        wanted.append(image.cls + image.position[0] + kind[0])
        for p in range(config.num_patches):
            row, column = divmod(p, config.grid)
            patch = batch.pixels_ICHW[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double() / 127.5 - 1
            content = image.mask if batch.patch_mask_IP[i, p] else image.patch.proj(patch.flatten())
            wanted.append(content + image.position[1 + p] + kind[0])
    for word, place in zip(batch.text_ids_T.tolist(), [0, 1, 2, 3, 4, 0, 1, 2], strict=True):
        wanted.append(text.word.weight[word] + text.position[place] + kind[1])
    torch.testing.assert_close(embed(embeddings, batch), torch.stack(wanted))


@pytest.mark.parametrize("patch_embed", ["linear", "conv"])
def test_hidden_pixels_change_nothing(patch_embed: str) -> None:
    config = config_of(patch_embed=patch_embed)
    encoder = Encoder(config, VOCAB)
    randomise(encoder)
    batch = batch_of("image", [0, 0], config)
    hidden = batch.patch_mask_IP.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(hidden, 255 - batch.pixels_ICHW, batch.pixels_ICHW)
    assert not torch.equal(other, batch.pixels_ICHW)
    encoder.eval()
    assert torch.equal(encoder(replace(batch, pixels_ICHW=other)).states_TD, encoder(batch).states_TD)
    seen = torch.where(hidden, batch.pixels_ICHW, 255 - batch.pixels_ICHW)
    assert not torch.equal(encoder(replace(batch, pixels_ICHW=seen)).states_TD, encoder(batch).states_TD)


def test_the_convolutional_stem_ends_at_the_patch_grid() -> None:
    for patch_size, image_size in [(2, 8), (4, 16), (16, 64)]:
        config = config_of(patch_embed="conv", patch_size=patch_size, image_size=image_size)
        stem = Embeddings(config, VOCAB).image.patch
        assert stem(torch.randn(2, 3, image_size, image_size)).shape == (2, config.num_patches, config.dim)


def positions_of(grid: int) -> torch.Tensor:
    """[CLS] 7, 8, 9; then x, y and 1 of each patch's centre in units of the image."""
    centre = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    plane = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3)
    return torch.cat([torch.tensor([[7.0, 8.0, 9.0]], dtype=torch.float64), plane])


@pytest.mark.parametrize("new", [24, 30])
def test_positions_resized_keep_their_place_in_the_image(new: int) -> None:
    resized = resize_positions(positions_of(14), new)
    wanted = positions_of(new)
    assert resized.shape == wanted.shape and resized.dtype == torch.float64
    assert torch.equal(resized[0], wanted[0])
    # torch's cubic follows a ramp within a twentieth of a patch, save at the border, where it has nothing to go by.
    inner = slice(5, -5)
    got, ramp = (t[1:].view(new, new, 3)[inner, inner] for t in (resized, wanted))
    torch.testing.assert_close(got, ramp, rtol=0, atol=0.05 / 14)


def test_positions_of_the_same_grid_stay() -> None:
    position = torch.randn(17, 6)
    assert torch.equal(resize_positions(position, 4), position)
    half = resize_positions(position.bfloat16(), 8)
    assert half.dtype == torch.bfloat16 and half.shape == (65, 6)


def test_each_width_is_interpolated_for_itself() -> None:
    position = torch.randn(26, 3)
    for d in range(3):
        plane = position[1:, d].view(1, 1, 5, 5)
        wanted = F.interpolate(plane, size=(9, 9), mode="bicubic", align_corners=False)
        torch.testing.assert_close(resize_positions(position, 9)[1:, d], wanted.flatten())
