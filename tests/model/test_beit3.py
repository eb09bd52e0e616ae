"""Our encoder with BEiT-3's switches against the `torchscale` package's BEiT3 with the same random weights."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.peers import ABSENT, available, build_beit3
from tests.benchmarks.workload import WORDS
from tests.model.support import BEIT3, batch_of, config_of, randomise
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder

pytestmark = pytest.mark.skipif(not available(), reason=ABSENT)

CONFIG = config_of(**BEIT3, vl_layers=0)
SIDES = {"A": "vision", "B": "text"}
OFFSET = 2
"""The first so many rows of its position tables belong to no token."""


def ours_of(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """BEiT-3's weights under our names; it has no embedding of the kind."""
    image, text = "embeddings.image", "embeddings.text"
    state = {
        "embeddings.kind": torch.zeros(2, config.dim),
        f"{image}.cls": theirs["vision_embed.cls_token"].flatten(),
        f"{image}.mask": theirs["vision_embed.mask_token"].flatten(),
        f"{image}.patch.proj.weight": theirs["vision_embed.proj.weight"].flatten(1),
        f"{image}.patch.proj.bias": theirs["vision_embed.proj.bias"],
        f"{image}.position": theirs["encoder.embed_positions.A.weight"][OFFSET:],
        f"{text}.word.weight": theirs["text_embed.weight"],
        f"{text}.position": theirs["encoder.embed_positions.B.weight"][OFFSET:][: config.max_text_length],
    }
    for kind in ("weight", "bias"):
        state |= {f"norm.{name}.{kind}": theirs[f"encoder.layer_norm.{side}.{kind}"] for side, name in SIDES.items()}
        for layer in range(config.layers):
            state |= dict(block_of(theirs, layer, kind))
    return state


def block_of(theirs: dict[str, Tensor], layer: int, kind: str) -> Iterator[tuple[str, Tensor]]:
    for side, name in SIDES.items():
        old, new = f"encoder.layers.{layer}", f"blocks.{layer}"
        yield (
            f"{new}.attention.{name}.qkv.{kind}",
            torch.cat([theirs[f"{old}.self_attn.{part}_proj.{side}.{kind}"] for part in "qkv"]),
        )
        for before, after in {
            f"self_attn_layer_norm.{side}": f"norm1.{name}",
            f"self_attn.inner_attn_ln.{side}": f"attention.{name}.norm",
            f"self_attn.out_proj.{side}": f"attention.{name}.out",
            f"final_layer_norm.{side}": f"norm2.{name}",
            f"ffn.{side}.fc1": f"ffn.{name}.up",
            f"ffn.{side}.ffn_layernorm": f"ffn.{name}.norm",
            f"ffn.{side}.fc2": f"ffn.{name}.down",
        }.items():
            yield f"{new}.{after}.{kind}", theirs[f"{old}.{before}.{kind}"]


def beit3_states(model: nn.Module, stream: StreamName, batch: Batch, lengths: Sequence[int]) -> Tensor:
    """Its final states of the tokens that are no padding, in our order."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    if stream != "image":
        ids[~padding] = batch.text_ids_T
    out = model(
        textual_tokens=ids if stream != "image" else None,
        visual_tokens=batch.pixels_ICHW.float() / 127.5 - 1 if stream != "text" else None,
        text_padding_position=padding if stream != "image" else None,
        vision_masked_position=batch.patch_mask_IP if stream != "text" else None,
    )["encoder_out"]
    images = 0 if stream == "text" else 1 + CONFIG.num_patches
    texts = out[:, images:][~padding] if stream != "image" else out[:0].flatten(0, 1)
    return torch.cat([out[:, :images].flatten(0, 1), texts])


@pytest.mark.parametrize("stream", STREAMS)
def test_states_and_gradients_equal_those_of_torchscale(stream: StreamName) -> None:
    torch.manual_seed(0)
    theirs, ours = build_beit3(CONFIG).eval(), Encoder(CONFIG, WORDS).eval()
    randomise(theirs)
    ours.load_state_dict(ours_of(theirs.state_dict(), CONFIG))
    batch, lengths = batch_of(stream, [7, 3, 12], CONFIG), [7, 3, 12]
    assert stream == "text" or (batch.patch_mask_IP.any() and not batch.patch_mask_IP.all())
    wanted, got = beit3_states(theirs, stream, batch, lengths), ours(batch).states_TD
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(wanted)
    (wanted * direction).sum().backward()
    (got * direction).sum().backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in theirs.named_parameters()}
    named = dict(ours.named_parameters())
    for name, gradient in ours_of(gradients, CONFIG).items():
        if name != "embeddings.kind":
            mine = named[name].grad
            mine = torch.zeros_like(gradient) if mine is None else mine
            torch.testing.assert_close(mine, gradient, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
