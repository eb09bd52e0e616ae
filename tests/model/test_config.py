"""What a model config refuses, and its counts against the built model and torch's FLOP counter."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.model.support import CODES, SPARSE, VOCAB, batch_of, config_of
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.config import PRESETS, ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.objectives.kinds.masked import Config, MaskedModelling

BOTH: dict[str, Any] = {"vision": {"num_experts": 8}, "text": {"num_experts": 6, "top_k": 2}}


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("attention", "per_modality"),
        ("sub_norm", True),
        ("positions", "relative"),
        ("positions", "relative_shared"),
        ("expert_pool", "shared"),
    ],
)
def test_what_is_not_built_is_refused_by_name(switch: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"{switch}: {value} is not built yet; leave it at its default"):
        config_of(**{switch: value})


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
    """Every parameter, of an expert's only the share of the chosen ones."""
    total = 0
    for name, parameter in model.named_parameters():
        share = 1.0
        if ".experts." in name:
            moe = config.moe.vision if ".vision." in name else config.moe.text
            assert moe is not None and parameter.shape[0] == moe.num_experts
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
]


@pytest.mark.parametrize("values", SWITCHES)
@pytest.mark.parametrize("moe", [{}, SPARSE, {"text": {"num_experts": 5}}])
def test_counts_equal_the_built_model_for_every_switch(values: dict[str, Any], moe: dict[str, Any]) -> None:
    config = config_of(**values, moe=moe)
    model = build(config, VOCAB, CODES)
    assert config.num_params(VOCAB, CODES) == size_of(model)
    assert config.num_params(VOCAB, None) == size_of(model.encoder)
    assert config.num_active_params(VOCAB, CODES) == active_by_hand(model, config)
    assert config.num_active_params(VOCAB, None) == active_by_hand(model, config) - size_of(model.heads)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("moe", [{}, BOTH])
def test_counts_equal_the_built_presets(preset: str, moe: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({"preset": preset, "moe": moe})
    model = build(config, 30522, 8192)
    assert config.num_params(30522, 8192) == size_of(model)
    assert config.num_params(30522, None) == size_of(model.encoder)
    assert config.num_active_params(30522, 8192) == active_by_hand(model, config)


def test_sizes_of_the_paper() -> None:
    moe = {"vision": {"num_experts": 32}, "text": {"num_experts": 32}}
    base = ModelConfig.model_validate({"preset": "base", "moe": moe})
    # The encoder alone: 1.93 B, of which 175.5 M and the routers are active; with both heads 1.96 B and 205.5 M.
    assert base.num_params(30522, None) == pytest.approx(1.93e9, rel=0.002)
    assert base.num_params(64010, None) == pytest.approx(1.96e9, rel=0.002)
    dense = ModelConfig.model_validate({"preset": "base"})
    assert dense.num_params(30522, None) == pytest.approx(175.2e6, rel=0.002)
    routers = 12 * 32 * 768
    assert base.num_active_params(30522, None) == dense.num_params(30522, None) + routers
    heads = 30522 * 769 + 8192 * 769
    assert base.num_params(30522, 8192) - base.num_params(30522, None) == heads


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


@pytest.mark.parametrize("values", [{}, {"patch_embed": "conv"}, {"vl_layers": 0}, {"vl_layers": 2, "qkv_bias": "qv"}])
@pytest.mark.parametrize("moe", [{}, SPARSE, {"vision": {"num_experts": 7, "top_k": 3}}])
@pytest.mark.parametrize(("stream", "image", "text"), [("image", 17, 0), ("text", 0, 21), ("pair", 17, 9)])
def test_flops_equal_the_counter(
    values: dict[str, Any], moe: dict[str, Any], stream: StreamName, image: int, text: int
) -> None:
    config = config_of(**values, moe=moe)
    encoder = Encoder(config, VOCAB).eval()
    batch = batch_of(stream, [text], config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(batch)
    assert config.flops(image, text) == pytest.approx(counter.get_total_flops(), rel=0.01)
