"""What a model config refuses, and its counts against the built model and torch's FLOP counter."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.model.support import BEIT3, CODES, SHARED, SPARSE, VLMO, VOCAB, batch_of, config_of, looped
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.config import PRESETS, ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.model.paths import unused_modules
from vlmoe_core.objectives.kinds.masked import Config, MaskedModelling

BOTH: dict[str, Any] = {"vision": {"num_experts": 8}, "text": {"num_experts": 6, "top_k": 2}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 5}, r"heads \(5\) must divide dim \(24\); these do: 1, 2, 3, 4, 6, 8, 12, 24$"),
        ({"image_size": 18}, r"image_size \(18\) must be a multiple of patch_size \(4\), such as 16"),
        ({"vl_layers": 4}, r"vl_layers \(4\) is more than layers \(3\)"),
        ({"moe": {"text": {"num_experts": 2, "layers": {"every": 4}}}}, r"moe\.text\.layers: every 4 does not fit 3"),
        ({"moe": {"vision": {"num_experts": 2, "layers": [3]}}}, r"moe\.vision\.layers \[3\] must be distinct blocks"),
        ({"moe": {"vision": {"num_experts": 2, "layers": [1, 1]}}}, r"moe\.vision\.layers \[1, 1\] must be distinct"),
        (
            {"patch_embed": "conv", "patch_size": 14, "image_size": 28},
            r"conv needs a patch_size of 2, 4, 8, 16, 32, 64, not 14",
        ),
        (
            {"patch_embed": "conv", "patch_size": 1, "image_size": 28},
            r"conv needs a patch_size of 2, 4, 8, 16, 32, 64, not 1$",
        ),
        (
            {"expert_pool": "shared"},
            r"expert_pool: shared needs moe\.shared, the pool of experts; add it, or leave out",
        ),
        ({**SHARED, "moe": {**SHARED["moe"], **SPARSE}}, r"in moe\.shared alone; leave out moe\.vision and moe\.text"),
        ({**SHARED, "moe": {"text": SPARSE["text"]}}, r"in moe\.shared alone; leave out moe\.vision and moe\.text"),
        (
            {"moe": SHARED["moe"]},
            r"moe\.shared is one pool for all modalities: set expert_pool: shared, or leave it out",
        ),
        (
            {"expert_pool": "shared", "moe": {"shared": {"num_experts": 2, "layers": [3]}}},
            r"moe\.shared\.layers \[3\] must be distinct blocks from 0 to 2",
        ),
        (
            {"sub_norm": True, "moe": {"text": {"num_experts": 2}}},
            r"sub_norm is not built into experts 'grouped': set moe\.text\.experts to loop, or sub_norm to false$",
        ),
        (
            {**SHARED, "sub_norm": True, "moe": {"shared": {"num_experts": 2, "experts": "tutel"}}},
            r"sub_norm is not built into experts 'tutel': set moe\.shared\.experts to loop",
        ),
        ({"norm_eps": 0}, "greater than 0"),
    ],
)
def test_mistakes_are_refused_with_their_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of(**values)
    (error,) = caught.value.errors()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["msg"])


def test_a_preset_fills_in_what_is_not_given() -> None:
    config = ModelConfig.model_validate({"preset": "base", "layers": 6})
    assert (config.layers, config.dim, config.heads, config.hidden) == (6, 768, 12, 3072)
    assert (config.grid, config.num_patches) == (14, 196)


def test_sparse_layers() -> None:
    config = config_of(layers=8, moe={"vision": {"num_experts": 2}, "text": {"num_experts": 2, "layers": [5, 0]}})
    assert config.sparse_layers("vision") == (1, 3, 5, 7)
    assert config.sparse_layers("text") == (0, 5)
    assert config_of().sparse_layers("vision") == ()
    assert config.sparse("vl", 7) is None and config.sparse("vision", 0) is None
    assert config.sparse("vision", 7) is config.moe.vision


def build(config: ModelConfig, vocab_size: int, codebook_size: int) -> MaskedModelling:
    with torch.device("meta"):
        return MaskedModelling(Config(), Encoder(config, vocab_size), vocab_size, codebook_size, None)


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def active_by_hand(model: MaskedModelling, config: ModelConfig) -> int:
    """Every trained parameter, of an expert's only the share of the chosen ones."""
    total = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        share = 1.0
        if ".experts." in name:
            moe = config.pools[name.split(".ffn.")[1].split(".")[0]]
            assert parameter.shape[0] == moe.num_experts
            share = moe.top_k / moe.num_experts
        total += round(parameter.numel() * share)
    return total


SWITCHES: list[dict[str, Any]] = [
    {},
    {"vl_layers": 0},
    {"vl_layers": 3},
    {"norm": "per_modality"},
    {"norm": "per_modality", "vl_layers": 0},
    {"qkv_bias": "qv"},
    {"qkv_bias": "none"},
    {"layer_scale": 0.1},
    {"patch_embed": "conv"},
    {"patch_embed": "conv", "patch_size": 16, "image_size": 64},
    {"max_text_length": 77},
    {"sub_norm": True},
    {"text_embed_norm": True},
    {"positions": "relative"},
    {"positions": "relative_shared", "max_text_length": 30, "image_size": 24},
    {"attention": "per_modality"},
    {"attention": "per_modality", "qkv_bias": "qv", "sub_norm": True},
    BEIT3,
    {**BEIT3, "vl_layers": 0, "positions": "relative"},
    VLMO,
]


POOLS: list[dict[str, Any]] = [
    {},
    {"moe": SPARSE},
    {"moe": {"text": {"num_experts": 5}}},
    SHARED,
    *(
        {"moe": {"vision": {"num_experts": 5, "router": name}}}
        for name in ("bias-balanced", "hash", "random", "uniform")
    ),
    {"moe": {"text": {"num_experts": 5, "top_k": 2, "router": {"name": "cosine", "dim": 7}, "shared_expert": True}}},
    {"expert_pool": "shared", "moe": {"shared": {"num_experts": 3, "router": "cosine", "shared_expert": True}}},
]


@pytest.mark.parametrize("values", SWITCHES)
@pytest.mark.parametrize("sparse", POOLS)
def test_counts_equal_the_built_model_for_every_switch(values: dict[str, Any], sparse: dict[str, Any]) -> None:
    config = config_of(**values, **(looped(sparse) if values.get("sub_norm") else sparse))
    model = build(config, VOCAB, CODES)
    assert config.num_params(VOCAB) == size_of(model.encoder)
    assert config.num_active_params(VOCAB) == active_by_hand(model, config) - size_of(model.heads)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("values", SWITCHES)
@pytest.mark.parametrize("sparse", [{}, {"moe": SPARSE}, SHARED])
def test_what_an_input_passes(values: dict[str, Any], sparse: dict[str, Any], stream: StreamName) -> None:
    config = config_of(**values, **(looped(sparse) if values.get("sub_norm") else sparse))
    model = build(config, VOCAB, CODES)
    elsewhere = {id(p) for module in unused_modules(model.encoder, {stream}) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in elsewhere or not name.startswith("encoder."):
            parameter.requires_grad_(False)
    assert config.num_path_params(stream, VOCAB) == active_by_hand(model, config)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("moe", [{}, BOTH])
def test_counts_equal_the_built_presets(preset: str, moe: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({"preset": preset, "moe": moe})
    model = build(config, 30522, 8192)
    assert config.num_params(30522) == size_of(model.encoder)
    assert config.num_active_params(30522) == active_by_hand(model, config) - size_of(model.heads)


def test_sizes_of_the_paper() -> None:
    moe = {"vision": {"num_experts": 32}, "text": {"num_experts": 32}}
    base = ModelConfig.model_validate({"preset": "base", "moe": moe})
    # 1.93 B, of which 175.5 M and the routers are active.
    assert base.num_params(30522) == pytest.approx(1.93e9, rel=0.002)
    assert base.num_params(64010) == pytest.approx(1.96e9, rel=0.002)
    dense = ModelConfig.model_validate({"preset": "base"})
    assert dense.num_params(30522) == pytest.approx(175.2e6, rel=0.002)
    routers = 12 * 32 * 768
    assert base.num_active_params(30522) == dense.num_params(30522) + routers


@pytest.mark.parametrize(
    ("preset", "image", "text", "billions"),
    [
        ("base", 197, 0, 34.9),
        ("base", 0, 64, 11.0),
        ("base", 197, 64, 46.9),
        ("base", 577, 40, 118.8),
        ("base", 901, 40, 192.5),
        ("small", 197, 0, 6.05),
        ("large", 197, 0, 122.8),
    ],
)
def test_flops_of_the_dense_presets(preset: str, image: int, text: int, billions: float) -> None:
    config = ModelConfig.model_validate({"preset": preset})
    # The published figures hold no patch embedding.
    patches = 2 * (image - 1) * 768 * config.dim if image else 0
    assert config.flops(image, text) - patches == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize(
    "values", [{}, {"patch_embed": "conv"}, {"vl_layers": 0}, {"vl_layers": 2, "qkv_bias": "qv"}, BEIT3, VLMO]
)
@pytest.mark.parametrize("sparse", [*POOLS, {"moe": {"vision": {"num_experts": 7, "top_k": 3}}}])
@pytest.mark.parametrize(("stream", "image", "text"), [("image", 17, 0), ("text", 0, 21), ("pair", 17, 9)])
def test_flops_equal_the_counter(
    values: dict[str, Any], sparse: dict[str, Any], stream: StreamName, image: int, text: int
) -> None:
    config = config_of(**values, **(looped(sparse) if values.get("sub_norm") else sparse))
    encoder = Encoder(config, VOCAB).eval()
    batch = batch_of(stream, [text], config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(batch)
    assert config.flops(image, text) == counter.get_total_flops()


def test_the_networks_of_a_block_with_a_shared_pool() -> None:
    config = config_of(**SHARED)
    assert [config.ffns(layer) for layer in range(3)] == [("vision", "text"), ("shared",), ("shared", "vl")]
    assert config.sparse_layers("shared") == (1, 2) and config.sparse_layers("vision") == ()
    assert config.sparse("shared", 2) is config.moe.shared and config.sparse("vl", 2) is None
    assert set(config.pools) == {"shared"} and set(config_of(moe=SPARSE).pools) == {"vision", "text"}


def test_a_shared_expert_and_every_chosen_one_are_active() -> None:
    def active(**values: Any) -> int:
        return config_of(moe={"text": {"num_experts": 5, "top_k": 2, "layers": [0], **values}}).num_active_params(9)

    dense = config_of().num_active_params(9)
    ffn = 24 * 40 + 40 + 40 * 24 + 24
    assert active() - dense == ffn + 5 * 24
    assert active(shared_expert=True) - dense == 2 * ffn + 5 * 24
    assert active(router="hash") - dense == ffn
