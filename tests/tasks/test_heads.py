import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from tests.model.support import VOCAB, batch_of, config_of, randomise
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.encoder import Encoded, Encoder
from vlmoe_core.tasks.heads import MLPHead, Pool, Pooler, TextPool, initialise_head, pool, width_of

POOLS: tuple[Pool, ...] = get_args(Pool)
CASES: list[tuple[StreamName, Pool | TextPool]] = [
    *(("pair", which) for which in POOLS),
    ("image", "image"),
    ("image", "mean"),
    ("text", "text"),
    ("text", "sentences"),
]
SECOND_AT = [3, 1, 5, 2]
"""Where the second sentence of each text begins; the second text has one sentence alone."""


def encoded_of(batch: Batch) -> Encoded:
    torch.manual_seed(0)
    encoder = Encoder(config_of(), VOCAB)
    randomise(encoder)
    encoded: Encoded = encoder.double().eval()(batch)
    return encoded


def two_sentences(stream: StreamName, batch: Batch) -> Batch:
    if stream != "text":
        return batch
    starts = torch.tensor(SECOND_AT)[batch.sequence_of_text]
    return replace(batch, second_text_T=batch.text_positions_T >= starts)


def plain(encoded: Encoded, batch: Batch, which: Pool | TextPool, sequence: int) -> Tensor:
    """What speaks for one sequence, from the list of its tokens."""
    images = encoded.states_TD[: 17 * batch.num_images].view(batch.num_images, 17, 24)
    texts = encoded.states_TD[17 * batch.num_images :]
    image = next((x for x, s in zip(images, batch.sequence_of_image, strict=True) if s == sequence), None)
    text = [x for x, s in zip(texts, batch.sequence_of_text, strict=True) if s == sequence]
    found = []
    if which in ("image", "both"):
        assert image is not None
        found.append(image[0])
    if which in ("mean", "means"):
        assert image is not None
        found.append(sum(image[1:]) / 16)
    if which in ("text", "both"):
        found.append(text[0])
    if which == "means":
        found.append(sum(text) / len(text))
    if which == "sentences":
        at = SECOND_AT[sequence]
        first, rest = sum(text[:at]) / at, text[at:]
        second = sum(rest) / len(rest) if rest else torch.zeros_like(first)
        found += [first, second, (first - second).abs(), first * second]
    return torch.cat(found)


@pytest.mark.parametrize(("stream", "which"), CASES)
def test_pool_equals_a_loop_over_sequences(stream: StreamName, which: Pool | TextPool) -> None:
    batch = two_sentences(stream, batch_of(stream, [4, 1, 9, 2], config_of()))
    encoded = encoded_of(batch)
    pooled = pool(encoded, batch, which)
    assert pooled.shape == (4, width_of(which, 24))
    for sequence, got in enumerate(pooled):
        torch.testing.assert_close(got, plain(encoded, batch, which, sequence), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stream", "which"), CASES)
def test_pool_of_nothing_keeps_the_graph(stream: StreamName, which: Pool | TextPool) -> None:
    batch = batch_of(stream, [], config_of())
    pooled = pool(encoded_of(batch), batch, which)
    assert pooled.shape == (0, width_of(which, 24))
    assert pooled.requires_grad


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_heads_by_their_formulas() -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    pooler, head = Pooler(12, 8).double(), MLPHead(12, 8, 3).double()
    dense, up, out = pooler.dense, head.up, head.out
    torch.testing.assert_close(pooler(x), torch.tanh(norm(x) @ dense.weight.T + dense.bias))
    hidden = norm(x @ up.weight.T + up.bias)
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    assert up.weight.shape == (16, 12)
    torch.testing.assert_close(head(x), hidden @ out.weight.T + out.bias)


def test_heads_start_like_the_encoder() -> None:
    head = initialise_head(MLPHead(200, 100, 60), 0.03)
    for linear in (head.up, head.out):
        assert linear.weight.std().item() == pytest.approx(0.03, rel=0.04)
        assert (linear.bias == 0).all()
    assert (head.norm.weight == 1).all() and (head.norm.bias == 0).all()
