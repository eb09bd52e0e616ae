"""Relative positions: every pair of tokens looked up on its own, and tables brought to other sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.support import SPARSE, VOCAB, Token, batch_of, config_of, randomise, relative_row
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import DataError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.model.layout import Layout, build_layout
from vlmoe_core.model.relative import Relative, RelativeBias, relate, resize_distances, resize_relative, spline_weights

CONFIG = config_of(positions="relative", max_text_length=9)
FEW_PATCHES = config_of(positions="relative", max_text_length=9, image_size=8)


def images_and_texts(lengths: list[int], config: ModelConfig) -> Batch:
    """Two images alone and texts alone in one batch."""
    images, texts = batch_of("image", [0, 0], config), batch_of("text", lengths, config)
    return replace(
        texts,
        pixels_ICHW=images.pixels_ICHW,
        patch_mask_IP=images.patch_mask_IP,
        image_ids=images.image_ids,
        sequence_of_image=images.sequence_of_image,
        sequence_of_text=texts.sequence_of_text + 2,
        example_of_sequence=torch.arange(2 + len(lengths)),
    )


BATCHES: dict[str, tuple[ModelConfig, Batch]] = {
    "images": (CONFIG, batch_of("image", [0, 0, 0], CONFIG)),
    "texts": (CONFIG, batch_of("text", [4, 9, 1], CONFIG)),
    "pairs": (CONFIG, batch_of("pair", [4, 2, 9], CONFIG)),
    "texts shorter than an image": (CONFIG, images_and_texts([4, 9], CONFIG)),
    "texts longer than an image": (FEW_PATCHES, images_and_texts([4, 9], FEW_PATCHES)),
    "no images": (CONFIG, batch_of("image", [], CONFIG)),
    "no texts": (CONFIG, batch_of("text", [], CONFIG)),
    "no pairs": (CONFIG, batch_of("pair", [], CONFIG)),
}


def layout_of(config: ModelConfig, batch: Batch) -> Layout:
    return build_layout(batch, 1 + config.num_patches)


def tokens_of(config: ModelConfig, batch: Batch) -> list[list[Token]]:
    """The tokens of each sequence in their order."""
    found: list[list[Token]] = [[] for _ in range(batch.num_sequences)]
    for sequence in batch.sequence_of_image.tolist():
        found[sequence] += [("image", place) for place in range(1 + config.num_patches)]
    for sequence, place in zip(batch.sequence_of_text.tolist(), batch.text_positions_T.tolist(), strict=True):
        found[sequence].append(("text", place))
    return found


def bias_of(config: ModelConfig, batch: Batch) -> tuple[Tensor, Relative, RelativeBias]:
    module = RelativeBias(config)
    randomise(module)
    relative = relate(layout_of(config, batch), batch.longest_text, config)
    return module(relative), relative, module


@pytest.mark.parametrize("name", BATCHES)
def test_every_pair_of_tokens_has_its_row(name: str) -> None:
    config, batch = BATCHES[name]
    bias, _, module = bias_of(config, batch)
    longest = layout_of(config, batch).length
    bias = bias.expand(batch.num_sequences, -1, longest, longest)
    for sequence, tokens in enumerate(tokens_of(config, batch)):
        for place, query in enumerate(tokens):
            rows = [relative_row(query, key, config.grid, 9) for key in tokens]
            assert torch.equal(bias[sequence, :, place, : len(tokens)], module.table[rows].T)


@pytest.mark.parametrize(("name", "shape"), [("images", (1, 17, 17)), ("texts", (1, 9, 9)), ("pairs", (1, 26, 26))])
def test_sequences_that_are_alike_share_one_bias(name: str, shape: tuple[int, ...]) -> None:
    bias, relative, _ = bias_of(*BATCHES[name])
    assert relative.row_XLL.shape == shape and relative.kind_S is None
    assert bias.shape == (1, CONFIG.heads, *shape[1:])


def test_images_alone_and_texts_alone_in_one_batch_are_two_kinds() -> None:
    bias, relative, _ = bias_of(*BATCHES["texts shorter than an image"])
    assert relative.row_XLL.shape == (2, 17, 17) and bias.shape == (4, CONFIG.heads, 17, 17)
    assert relative.kind_S is not None and relative.kind_S.tolist() == [0, 0, 1, 1]


def test_all_rows_of_a_table_can_be_met() -> None:
    batch = batch_of("pair", [9], CONFIG)
    rows = relate(layout_of(CONFIG, batch), batch.longest_text, CONFIG).row_XLL
    assert sorted(set(rows.flatten().tolist())) == list(range(CONFIG.relative_rows))


@pytest.mark.parametrize("positions", ["relative", "relative_shared"])
@pytest.mark.parametrize("stream", ["text", "pair"])
def test_a_text_beyond_the_distances_is_refused(stream: StreamName, positions: str) -> None:
    encoder = Encoder(config_of(positions=positions, max_text_length=9), VOCAB)
    encoder(batch_of(stream, [9, 3], encoder.config))
    with pytest.raises(DataError, match=r"text has 10 tokens.*max_text_length = 9: cut the texts \(data\.max_text\)"):
        encoder(batch_of(stream, [3, 10], encoder.config))


@pytest.mark.parametrize(("positions", "calls"), [("absolute", 0), ("relative_shared", 1), ("relative", 3)])
def test_a_shared_bias_is_computed_once_for_all_blocks(
    positions: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(config_of(positions=positions, moe=SPARSE), VOCAB)
    forward, seen = RelativeBias.forward, []
    monkeypatch.setattr(RelativeBias, "forward", lambda self, r: seen.append(1) or forward(self, r))
    encoder(batch_of("pair", [3, 2], encoder.config)).states_TD.sum().backward()
    tables = [p for n, p in encoder.named_parameters() if n.endswith("relative.table")]
    assert len(seen) == len(tables) == calls
    assert all(table.grad is not None and table.grad.any() for table in tables)


@pytest.mark.parametrize("positions", ["relative", "relative_shared"])
def test_bfloat16_follows_float32(positions: str) -> None:
    encoder = Encoder(config_of(positions=positions), VOCAB).eval()
    randomise(encoder, 0.1)
    batch = batch_of("pair", [5, 3], encoder.config)
    wanted = encoder(batch).states_TD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder(batch).states_TD
    assert (got - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def grown(config: ModelConfig, **values: Any) -> ModelConfig:
    return config.model_copy(update=values)


def test_equal_sizes_change_nothing() -> None:
    table = torch.randn(CONFIG.relative_rows, 3)
    assert torch.equal(resize_relative(table, 4, 4, 9, 9), table)


@pytest.mark.parametrize(("longest", "size"), [(12, 16), (5, 16), (9, 24), (9, 12), (12, 4)])
def test_rows_that_both_sizes_have_stay(longest: int, size: int) -> None:
    table = torch.randn(CONFIG.relative_rows, 3)
    new = grown(CONFIG, max_text_length=longest, image_size=size)
    got = resize_relative(table, 4, new.grid, 9, longest)
    assert got.shape == (new.relative_rows, 3)
    for kind in ("image", "text"):
        for query, key in [((kind, 0), (kind, 1)), ((kind, 1), (kind, 0)), ((kind, 0), (kind, 0))]:
            row, old = (relative_row(query, key, g, m) for g, m in ((new.grid, longest), (4, 9)))  # type: ignore[arg-type]
            assert torch.equal(got[row], table[old])
    for distance in range(2 - longest, longest - 1):
        start = max(1, 1 - distance)
        row = relative_row(("text", start), ("text", start + distance), new.grid, longest)
        known = max(-7, min(7, distance))
        start = max(1, 1 - known)
        assert torch.equal(got[row], table[relative_row(("text", start), ("text", start + known), 4, 9)])
    crosses = [(("text", 0), ("image", 3)), (("image", 3), ("text", 2))]
    for query, key in crosses:
        row, old = relative_row(query, key, new.grid, longest), relative_row(query, key, 4, 9)  # type: ignore[arg-type]
        assert torch.equal(got[row], table[old])


def test_distances_are_interpolated_as_beits_finetuning_does() -> None:
    """Figures of FITPACK's bicubic spline (scipy 1.17, RectBivariateSpline) at the places that BEiT's script takes."""
    plane = torch.tensor([[(7 * i * i + 3 * j + i * j) % 11 for j in range(7)] for i in range(7)], dtype=torch.float64)
    larger = resize_distances(plane.reshape(-1, 1), 4, 6).view(11, 11)
    first = [0, 2.368142714, 2.990891575, 3.272235118, 6, 9, 1, 0.977769944, 7.509112347, 11.381837213, 7]
    column = [3.272235118, 4.172370469, 1.839204265, -0.735091642, 0.5916661, 6.679780138]
    column += [8.676691502, 7.610436228, 5.93903536, 5.624340899, 7.458820055]
    torch.testing.assert_close(larger[0], torch.tensor(first, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(larger[:, 3], torch.tensor(column, dtype=torch.float64), rtol=0, atol=1e-8)
    smaller = resize_distances(plane.reshape(-1, 1), 4, 3).view(5, 5)
    second = torch.tensor([0.008719888, 5, 10, 4, 8.94367197], dtype=torch.float64)
    torch.testing.assert_close(smaller[1], second, rtol=0, atol=1e-8)


@pytest.mark.parametrize("number", [1, 3, 5, 27, 63])
def test_the_spline_goes_through_its_points_and_keeps_cubics(number: int) -> None:
    known = torch.linspace(-1, 1, number, dtype=torch.float64) ** 3 * 40 + torch.arange(number)
    torch.testing.assert_close(spline_weights(known, known), torch.eye(number, dtype=torch.float64), rtol=0, atol=1e-7)
    wanted = torch.linspace(known[0].item(), known[-1].item(), 50, dtype=torch.float64)
    powers = torch.arange(min(4, number))
    got = spline_weights(known, wanted) @ (known[:, None] / 50) ** powers
    torch.testing.assert_close(got, (wanted[:, None] / 50) ** powers, rtol=0, atol=1e-6)


def test_a_larger_image_keeps_the_sense_of_a_smooth_bias() -> None:
    """Near patches stay near: a bias that falls with the distance falls with it at the new resolution too."""
    old, new = config_of(image_size=56, patch_size=4), config_of(image_size=96, patch_size=4)
    side = torch.arange(1 - old.grid, old.grid, dtype=torch.float64)
    plane = torch.exp(-(side[:, None] ** 2 + side**2).sqrt() / 4)
    got = resize_distances(plane.reshape(-1, 1), old.grid, new.grid).view(2 * new.grid - 1, -1)
    centre = new.grid - 1
    assert got[centre, centre].item() == pytest.approx(1)
    assert (got[centre, centre:].diff() < 1e-3).all()
    torch.testing.assert_close(got, got.T)
    torch.testing.assert_close(got, got.flip(0))
