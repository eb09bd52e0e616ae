"""Which parameters an input passes, against what autograd finds."""

from itertools import combinations
from typing import Any

import pytest
import torch

from tests.model.support import BEIT3, SHARED, SPARSE, VLMO, VOCAB, batch_of, config_of, looped
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.model.paths import ffns_of, freeze_unused, unused_modules

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"moe": SPARSE, "vl_layers": 2},
    "without VL": {"moe": SPARSE, "vl_layers": 0},
    "all VL": {"vl_layers": 3},
    "shared": SHARED,
    "shared without VL": {**SHARED, "vl_layers": 0},
    "own norms": {"moe": SPARSE, "norm": "per_modality"},
    "own norms, shared": {**SHARED, "norm": "per_modality", "vl_layers": 2},
    "BEiT-3": {**BEIT3, **looped({"moe": SPARSE})},
    "BEiT-3, shared": {**BEIT3, **looped(SHARED), "vl_layers": 0},
    "own attention": {"attention": "per_modality", "moe": SPARSE, "positions": "relative_shared"},
    "VLMo": VLMO,
    "conv": {"patch_embed": "conv", "layer_scale": 0.1, "qkv_bias": "qv"},
}
INPUTS: list[tuple[StreamName, ...]] = [inputs for n in (1, 2, 3) for inputs in combinations(STREAMS, n)]


def met(encoder: Encoder, inputs: tuple[StreamName, ...]) -> set[str]:
    """Parameters that autograd finds on the way of these inputs; none of an embedding that ran on no token."""
    encoder.zero_grad()
    tokens = {"image": {"image", "pair"}, "text": {"text", "pair"}}
    without = tuple(f"embeddings.{kind}." for kind, streams in tokens.items() if not streams & set(inputs))
    batches = [batch_of(stream, [4, 2], encoder.config) for stream in inputs]
    torch.stack([encoder(batch).states_TD.sum() for batch in batches]).sum().backward()
    return {n for n, p in encoder.named_parameters() if p.grad is not None and not n.startswith(without or "-")}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("model", MODELS)
def test_unused_is_what_autograd_does_not_find(model: str, inputs: tuple[StreamName, ...]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(config_of(**MODELS[model]), VOCAB).train()
    wanted = met(encoder, inputs)
    unused = {id(p) for module in unused_modules(encoder, inputs) for p in module.parameters()}
    assert {n for n, p in encoder.named_parameters() if id(p) not in unused} == wanted
    freeze_unused(encoder, inputs)
    assert {n for n, p in encoder.named_parameters() if p.requires_grad} == wanted


def test_a_frozen_encoder_keeps_its_gradients() -> None:
    encoder = Encoder(config_of(moe=SPARSE), VOCAB)
    pair: StreamName = "pair"
    freeze_unused(encoder, [pair])
    encoder(batch_of("pair", [3], encoder.config)).states_TD.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())


def test_networks_by_hand() -> None:
    config = config_of(moe=SPARSE, vl_layers=1)
    below: dict[StreamName, tuple[str, ...]] = {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}
    assert [{s: ffns_of(config, layer, s) for s in STREAMS} for layer in (0, 1, 2)] == [
        below,
        below,
        {**below, "pair": ("vl",)},
    ]
    shared = config_of(**SHARED, vl_layers=1)
    assert [ffns_of(shared, layer, "pair") for layer in (0, 1, 2)] == [("vision", "text"), ("shared",), ("vl",)]
    assert [ffns_of(shared, layer, "image") for layer in (0, 1, 2)] == [("vision",), ("shared",), ("shared",)]


def test_with_every_input_all_is_used() -> None:
    encoder = Encoder(config_of(moe=SPARSE), VOCAB)
    assert list(unused_modules(encoder, STREAMS)) == []
