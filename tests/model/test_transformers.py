"""The encoder with dense feed-forward networks against transformers' modules with the same random weights."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.support import VOCAB, batch_of, config_of, randomise
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder

TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


def encoder_of(dtype: torch.dtype, **values: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config_of(**values), VOCAB).eval()
    randomise(encoder)
    return encoder.to(dtype)


def vit(config: ModelConfig) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(**image_sizes(config), qkv_bias=config.qkv_bias == "all"),
        add_pooling_layer=False,
        use_mask_token=True,
    )


def beit(config: ModelConfig) -> nn.Module:
    from transformers import BeitConfig, BeitModel

    values = image_sizes(config) | {
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": config.positions == "relative",
        "use_shared_relative_position_bias": config.positions == "relative_shared",
        "layer_scale_init_value": config.layer_scale or 0.0,
        "use_mean_pooling": False,
        "use_mask_token": True,
    }
    return BeitModel(BeitConfig(**values), add_pooling_layer=False)


def sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.norm_eps,
    }


def image_sizes(config: ModelConfig) -> dict[str, Any]:
    return sizes(config) | {"image_size": config.image_size, "patch_size": config.patch_size}


def weight_and_bias(theirs: str, ours: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {f"{theirs}.{kind}": ours[f"{name}.{kind}"] for kind in ("weight", "bias")}


def image_state(encoder: Encoder) -> dict[str, Tensor]:
    """Our image-only weights under the names of transformers' ViT and BEiT; they have no embedding of the kind."""
    config, ours = encoder.config, encoder.state_dict()
    image, side = "embeddings.image", config.patch_size
    state = {
        "embeddings.cls_token": ours[f"{image}.cls"].view(1, 1, -1),
        "embeddings.mask_token": ours[f"{image}.mask"].view(1, 1, -1),
        "embeddings.position_embeddings": (ours[f"{image}.position"] + ours["embeddings.kind"][0])[None],
        "embeddings.patch_embeddings.projection.weight": ours[f"{image}.patch.proj.weight"].view(-1, 3, side, side),
        "embeddings.patch_embeddings.projection.bias": ours[f"{image}.patch.proj.bias"],
        **weight_and_bias("layernorm", ours, "norm"),
    }
    if config.positions == "relative_shared":
        table = ours["relative.table"][: config.image_distances]
        state["shared_position_bias.relative_position_bias_table"] = table
    for i in range(config.layers):
        names = {
            "layernorm_before": "norm1",
            "layernorm_after": "norm2" if config.norm == "shared" else "norm2.vision",
            "attention.o_proj": "attention.out",
            "mlp.fc1": "ffn.vision.up",
            "mlp.fc2": "ffn.vision.down",
        }
        for theirs, name in names.items():
            state |= weight_and_bias(f"layers.{i}.{theirs}", ours, f"blocks.{i}.{name}")
        state |= qkv_state(f"layers.{i}.attention", ("q_proj", "k_proj", "v_proj"), ours, f"blocks.{i}.attention")
        if config.layer_scale is not None:
            state |= {f"layers.{i}.lambda_{n}": ours[f"blocks.{i}.scale{n}"] for n in (1, 2)}
        if config.positions == "relative":
            table = ours[f"blocks.{i}.attention.relative.table"][: config.image_distances]
            state[f"layers.{i}.relative_position_bias.relative_position_bias_table"] = table
    return state


def qkv_state(theirs: str, names: tuple[str, ...], ours: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    weights = ours[f"{name}.qkv.weight"].chunk(3)
    state = {f"{theirs}.{n}.weight": w for n, w in zip(names, weights, strict=True)}
    if f"{name}.qkv.bias" in ours:
        biases = ours[f"{name}.qkv.bias"].chunk(3)
        state |= {f"{theirs}.{n}.bias": b for n, b in zip(names, biases, strict=True)}
    if f"{name}.q_bias" in ours:
        state |= {f"{theirs}.{names[0]}.bias": ours[f"{name}.q_bias"]}
        state |= {f"{theirs}.{names[2]}.bias": ours[f"{name}.v_bias"]}
    return state


CASES: list[tuple[Callable[[ModelConfig], nn.Module], dict[str, Any]]] = [
    (vit, {}),
    (vit, {"norm": "per_modality"}),
    (vit, {"qkv_bias": "none", "vl_layers": 0}),
    (beit, {"qkv_bias": "qv", "layer_scale": 0.1}),
    (beit, {"qkv_bias": "qv", "norm": "per_modality"}),
    (beit, {"qkv_bias": "qv", "layer_scale": 0.1, "positions": "relative"}),
    (beit, {"qkv_bias": "qv", "layer_scale": 0.1, "positions": "relative_shared"}),
    (beit, {"qkv_bias": "qv", "norm_eps": 1e-3}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("build", "values"), CASES)
def test_images_equal_vit_and_beit(
    build: Callable[[ModelConfig], nn.Module], values: dict[str, Any], dtype: torch.dtype
) -> None:
    encoder = encoder_of(dtype, **values)
    theirs = build(encoder.config).to(dtype).eval()
    theirs.load_state_dict(image_state(encoder))
    batch = batch_of("image", [0, 0, 0], encoder.config)
    pixels = batch.pixels_ICHW.to(dtype) / 127.5 - 1
    with torch.no_grad():
        wanted = theirs(pixels, bool_masked_pos=batch.patch_mask_IP).last_hidden_state
        got = encoder(batch).image_states_IND
    assert batch.patch_mask_IP.any() and not batch.patch_mask_IP.all()
    torch.testing.assert_close(got, wanted, **TOLERANCE[dtype])


@pytest.mark.parametrize("positions", ["absolute", "relative", "relative_shared"])
def test_gradients_equal_those_of_beit(positions: str) -> None:
    encoder = encoder_of(torch.float64, qkv_bias="qv", layer_scale=0.1, positions=positions)
    theirs = beit(encoder.config).double().eval()
    theirs.load_state_dict(image_state(encoder))
    batch = batch_of("image", [0, 0], encoder.config)
    pixels = batch.pixels_ICHW.double() / 127.5 - 1
    theirs(pixels, bool_masked_pos=batch.patch_mask_IP).last_hidden_state.square().sum().backward()
    encoder(batch).image_states_IND.square().sum().backward()
    # Gradients of our parameters, under the names of theirs.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    ours = image_state(encoder)
    for name, parameter in theirs.named_parameters():
        if name != "embeddings.position_embeddings":
            torch.testing.assert_close(ours[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["shared", "per_modality"])
def test_texts_equal_a_pre_norm_roberta_on_padded_rows(norm: str, dtype: torch.dtype) -> None:
    from transformers import XLMRobertaXLConfig, XLMRobertaXLModel

    encoder = encoder_of(dtype, norm=norm)
    config = encoder.config
    rows = config.max_text_length
    theirs = XLMRobertaXLModel(
        XLMRobertaXLConfig(**sizes(config), vocab_size=VOCAB, max_position_embeddings=rows, pad_token_id=0),
        add_pooling_layer=False,
    ).to(dtype)
    theirs.load_state_dict(text_state(encoder))
    theirs.eval()
    lengths = [7, 3, 12]
    batch = batch_of("text", lengths, config)
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for i, text in enumerate(batch.text_ids_T.split(lengths)):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask, position_ids=torch.arange(12).expand(3, -1)).last_hidden_state
        got = encoder(batch).text_states_TD
    torch.testing.assert_close(got, wanted[mask.bool()], **TOLERANCE[dtype])


def text_state(encoder: Encoder) -> dict[str, Tensor]:
    """Our text-only weights under the names of transformers' XLMRobertaXL, whose norms stand before the branches."""
    config, ours = encoder.config, encoder.state_dict()
    state = {
        "embeddings.word_embeddings.weight": ours["embeddings.text.word.weight"],
        "embeddings.position_embeddings.weight": ours["embeddings.text.position"],
        "embeddings.token_type_embeddings.weight": ours["embeddings.kind"][1:],
        **weight_and_bias("encoder.LayerNorm", ours, "norm"),
    }
    for i in range(config.layers):
        names = {
            "attention.self_attn_layer_norm": "norm1",
            "LayerNorm": "norm2" if config.norm == "shared" else "norm2.text",
            "attention.output.dense": "attention.out",
            "intermediate.dense": "ffn.text.up",
            "output.dense": "ffn.text.down",
        }
        layer = f"encoder.layer.{i}"
        for theirs, name in names.items():
            state |= weight_and_bias(f"{layer}.{theirs}", ours, f"blocks.{i}.{name}")
        state |= qkv_state(f"{layer}.attention.self", ("query", "key", "value"), ours, f"blocks.{i}.attention")
    return state
