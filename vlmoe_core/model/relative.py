"""A bias on the attention logits for the distance of two tokens (BEiT, arXiv 2106.08254; VLMo, arXiv 2111.02358).

The rows of a table, in the order of VLMo's, with g the patches along a side, M `max_text_length`, I = (2g - 1)^2 + 3:

- 0 to I - 4: two patches, by (rows + g - 1) * (2g - 1) + columns + g - 1, the place of the query less that of the key;
- I - 3, I - 2, I - 1: [CLS] of an image to a patch, a patch to [CLS], [CLS] to itself;
- I: a text token to an image token; I + 1: an image token to a text token;
- I + 2 to I + 2M - 2: two words, by the position of the key less that of the query, from 2 - M to M - 2;
- I + 2M - 1 to I + 2M + 1: [CLS] of a text to a word, a word to [CLS], [CLS] to itself.

Axis letters: S sequences, L places of a sequence, H heads, R rows of the table, X kinds of sequences, P patches,
N tokens of an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.errors import DataError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.layout import Layout


@dataclass(frozen=True)
class Relative:
    """How the places of a batch's sequences stand to each other."""

    row_XLL: Tensor
    """int64, the row of the table for each query (first) and key. X is 1 where all sequences are alike; with images
    alone and texts alone in one batch it is 2, the former first."""
    kind_S: Tensor | None
    """int64, which of the two each sequence is; null: all are alike."""
    bias_XHLL: Tensor | None = None
    """The bias of all blocks, where they share one; X is 1 or S."""


class RelativeBias(nn.Module):
    """One learned bias a head for each distance; zero at the start."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(config.relative_rows, config.heads))

    def forward(self, relative: Relative) -> Tensor:
        """-> (1, H, L, L) where all sequences are alike, else (S, H, L, L)."""
        bias_XHLL = F.embedding(relative.row_XLL, self.table).permute(0, 3, 1, 2)
        return bias_XHLL if relative.kind_S is None else bias_XHLL.index_select(0, relative.kind_S)


def relate(layout: Layout, longest_text: int, config: ModelConfig) -> Relative:
    """The rows of the relative table for a batch whose longest text has that many tokens.

    Raises:
        DataError: that is more than the distances of the table allow.
    """
    if longest_text > config.max_text_length:
        raise DataError(
            f"a text has {longest_text} tokens, but the relative positions of this model go to max_text_length = "
            f"{config.max_text_length}: cut the texts (data.max_text), or finetune the model with a larger one"
        )
    device = layout.place_T.device
    image_NN, text_LL = _image_rows(config, device), _text_rows(longest_text, config, device)
    if layout.fused:
        return Relative(_fit(_pair_rows(image_NN, text_LL, config), layout.length)[None], None)
    rows = {"vision": _fit(image_NN, layout.length), "text": _fit(text_LL, layout.length)}
    row_XLL = torch.stack([rows[modality] for modality in layout.modalities])
    return Relative(row_XLL, _kind_of_sequences(layout) if len(rows) == len(layout.modalities) else None)


def _kind_of_sequences(layout: Layout) -> Tensor:
    """(S,), 1 for the texts."""
    kind_S = torch.zeros(layout.num_sequences, dtype=torch.int64, device=layout.place_T.device)
    return kind_S.index_fill(0, layout.sequence_T[layout.num_image_tokens :], 1)


def _image_rows(config: ModelConfig, device: torch.device) -> Tensor:
    """(N, N) for two tokens of an image."""
    side = torch.arange(config.grid, device=device)
    distance = side[:, None] - side + config.grid - 1
    row = distance[:, None, :, None] * (2 * config.grid - 1) + distance[None, :, None, :]
    return _with_cls(row.reshape(config.num_patches, config.num_patches), config.image_distances - 3)


def _text_rows(length: int, config: ModelConfig, device: torch.device) -> Tensor:
    """(length, length) for two tokens of a text."""
    word = torch.arange(length, device=device)
    zero = config.image_distances + config.max_text_length
    return _fit(_with_cls(zero + word - word[:, None], config.relative_rows - 3), length)


def _with_cls(row_PP: Tensor, first: int) -> Tensor:
    """Put [CLS] before all others; its three rows begin with `first`."""
    others = F.pad(row_PP, (1, 0), value=first + 1)
    cls = F.pad(row_PP.new_full((1, row_PP.shape[1]), first), (1, 0), value=first + 2)
    return torch.cat([cls, others])


def _pair_rows(image_NN: Tensor, text_LL: Tensor, config: ModelConfig) -> Tensor:
    """(N + L, N + L): the image first, then the text."""
    from_image = F.pad(image_NN, (0, text_LL.shape[0]), value=config.image_distances + 1)
    from_text = F.pad(text_LL, (image_NN.shape[0], 0), value=config.image_distances)
    return torch.cat([from_image, from_text])


def _fit(row_LL: Tensor, length: int) -> Tensor:
    """Cut to so many places, or filled up; no token stands where it is."""
    more = length - row_LL.shape[0]
    return F.pad(row_LL, (0, more, 0, more))


def resize_relative(table_RH: Tensor, old_grid: int, new_grid: int, old_text: int, new_text: int) -> Tensor:
    """Bring a relative table to another number of patches or another length of texts.

    Distances of patches as BEiT's finetuning has them: the old ones are taken to lie further apart the larger they are,
    in a geometric progression that ends where the new ones end; a cubic spline through them gives the new ones.
    Distances of words are cut, or go on with the value of the furthest one; all other rows stay.

    Args:
        table_RH: (R, H) as the head of this file describes it.
        old_grid: the old number of patches along a side.
        new_grid: the new one.
        old_text: the old `max_text_length`.
        new_text: the new one.

    Returns:
        (new R, H).
    """
    patches = (2 * old_grid - 1) ** 2
    near_RH, between_RH, words_RH = table_RH[:patches], table_RH[patches : patches + 5], table_RH[patches + 5 :]
    resized_RH = resize_distances(near_RH, old_grid, new_grid)
    return torch.cat([resized_RH, between_RH, _resize_words(words_RH, old_text, new_text)])


def _resize_words(text_RH: Tensor, old: int, new: int) -> Tensor:
    """The distances from 2 - old to old - 2, for 2 - new to new - 2; the rows of [CLS] stay."""
    distance = torch.arange(2 - new, new - 1, device=text_RH.device).clamp(2 - old, old - 2)
    return torch.cat([text_RH[distance + old - 2], text_RH[-3:]])


def resize_distances(plane_RH: Tensor, old_grid: int, new_grid: int) -> Tensor:
    """((2 old_grid - 1)^2, H) -> ((2 new_grid - 1)^2, H), the distances of two patches."""
    if old_grid == new_grid:
        return plane_RH
    known = _spread(old_grid - 1, new_grid - 1)
    wanted = torch.arange(1 - new_grid, new_grid, dtype=torch.float64).clamp(known[0], known[-1])
    weights = spline_weights(known, wanted).to(plane_RH.device)
    plane = plane_RH.to(torch.float64).unflatten(0, (2 * old_grid - 1, -1))  # type: ignore[no-untyped-call]
    plane = torch.einsum("ay,bx,yxh->abh", weights, weights, plane)
    return plane.flatten(0, 1).to(plane_RH.dtype)


def _spread(old: int, new: int) -> Tensor:
    """Where the distances from -old to old are taken to lie, so that they reach from -new to new.

    They are 1, 1 + q, 1 + q + q^2, ...; BEiT looks for q between 1.01 and 1.5, to 1e-6.
    """
    low, high, ratio = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**old) / (1 - ratio) > new else (ratio, high)
    steps = (ratio ** torch.arange(old, dtype=torch.float64)).cumsum(0)
    return torch.cat([-steps.flip(0), steps.new_zeros(1), steps])


def spline_weights(known: Tensor, wanted: Tensor) -> Tensor:
    """The matrix that takes values at `known` to those of the cubic spline through them at `wanted`.

    The third derivative jumps nowhere at the second and the last but one place ("not-a-knot"); fewer than four values
    give the polynomial through them.

    Args:
        known: (n,) float64, ascending.
        wanted: (m,) float64, within those.

    Returns:
        (m, n).
    """
    scale = known.abs().max().clamp(min=1.0)
    knots, powers = known[2:-2] / scale, torch.arange(min(4, len(known)), dtype=known.dtype)

    def basis(x: Tensor) -> Tensor:
        x = x[:, None] / scale
        return torch.cat([x**powers, F.relu(x - knots) ** 3], dim=1)

    weights: Tensor = torch.linalg.solve(basis(known), basis(wanted), left=False)
    return weights
