"""Our encoder with VLMo's switches against VLMo written straight from its paper and released code.

The reference takes one sequence after the other, the text before the image as VLMo has them, and looks each relative
position up on its own.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.support import VLMO, VOCAB, Token, batch_of, config_of, randomise, relative_row
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.model.relative import resize_relative

CONFIG = config_of(**VLMO)
LONGEST = 40
"""Length of text that its table was made for; ours is made for less."""


def random_vlmo(config: ModelConfig) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of a released checkpoint."""
    dim, hidden, side = config.dim, config.hidden, config.patch_size
    rows = (2 * config.grid - 1) ** 2 + 3 + 2 * LONGEST + 2
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.cls_token": (1, 1, dim),
        "transformer.patch_embed.proj.weight": (dim, 3, side, side),
        "transformer.patch_embed.proj.bias": (dim,),
        "transformer.norm.weight": (dim,),
        "transformer.norm.bias": (dim,),
        "text_embeddings.word_embeddings.weight": (VOCAB, dim),
        "text_embeddings.token_type_embeddings.weight": (2, dim),
        "text_embeddings.LayerNorm.weight": (dim,),
        "text_embeddings.LayerNorm.bias": (dim,),
        "token_type_embeddings.weight": (2, dim),
        "relative_position_bias_table": (rows, config.layers * config.heads),
    }
    for layer in range(config.layers):
        fused = ["vl"] if layer >= config.layers - config.vl_layers else []
        block: dict[str, tuple[int, ...]] = {
            "attn.qkv.weight": (3 * dim, dim),
            **dict.fromkeys(("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2", "attn.proj.bias"), (dim,)),
            "attn.proj.weight": (dim, dim),
            **dict.fromkeys(("norm1.weight", "norm1.bias"), (dim,)),
        }
        for name in ("text", "imag", *fused):
            block |= {f"norm2_{name}.weight": (dim,), f"norm2_{name}.bias": (dim,)}
            block |= {f"mlp_{name}.fc1.weight": (hidden, dim), f"mlp_{name}.fc1.bias": (hidden,)}
            block |= {f"mlp_{name}.fc2.weight": (dim, hidden), f"mlp_{name}.fc2.bias": (dim,)}
        shapes |= {f"transformer.blocks.{layer}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {n: 0.2 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def ours_of(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A released checkpoint's weights under our names. Its words have no positions, but BERT's kind of sentence A."""
    image, text, old = "embeddings.image", "embeddings.text", "text_embeddings"
    state = {
        "embeddings.kind": theirs["token_type_embeddings.weight"].flip(0),
        f"{image}.cls": theirs["transformer.cls_token"].flatten(),
        f"{image}.position": torch.zeros(1 + config.num_patches, config.dim),
        f"{image}.patch.proj.weight": theirs["transformer.patch_embed.proj.weight"].flatten(1),
        f"{image}.patch.proj.bias": theirs["transformer.patch_embed.proj.bias"],
        f"{text}.word.weight": theirs[f"{old}.word_embeddings.weight"],
        f"{text}.position": theirs[f"{old}.token_type_embeddings.weight"][:1].expand(config.max_text_length, -1),
    }
    for kind in ("weight", "bias"):
        state[f"{text}.norm.{kind}"] = theirs[f"{old}.LayerNorm.{kind}"]
        state[f"norm.{kind}"] = theirs[f"transformer.norm.{kind}"]
    tables = theirs["relative_position_bias_table"].chunk(config.layers, dim=1)
    for layer, table in enumerate(tables):
        block = f"blocks.{layer}"
        table = resize_relative(table, config.grid, config.grid, LONGEST, config.max_text_length)
        state |= block_of(theirs, layer) | {f"{block}.attention.relative.table": table}
    return state


def block_of(theirs: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    old, new = f"transformer.blocks.{layer}.", f"blocks.{layer}."
    renamed = {
        "attn.proj": "attention.out",
        "attn.": "attention.",
        "gamma_": "scale",
        **{f"norm2_{a}": f"norm2.{b}" for a, b in (("imag", "vision"), ("text", "text"), ("vl", "vl"))},
        **{f"mlp_{a}": f"ffn.{b}" for a, b in (("imag", "vision"), ("text", "text"), ("vl", "vl"))},
        ".fc1": ".up",
        ".fc2": ".down",
    }
    state = {}
    for name, tensor in theirs.items():
        if name.startswith(old):
            name = name.removeprefix(old)
            for before, after in renamed.items():
                name = name.replace(before, after)
            state[new + name] = tensor
    return state


def tokens_of(kind: StreamName, number: int) -> list[Token]:
    return [(kind, place) for place in range(number)]


class Reference:
    """VLMo over one sequence at a time."""

    def __init__(self, weights: dict[str, Tensor], config: ModelConfig) -> None:
        self.w, self.config = weights, config

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, (self.config.dim,), self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def text(self, ids: Tensor) -> Tensor:
        old = "text_embeddings"
        x = self.w[f"{old}.word_embeddings.weight"][ids] + self.w[f"{old}.token_type_embeddings.weight"][0]
        return self.norm(x, f"{old}.LayerNorm", 1e-12) + self.w["token_type_embeddings.weight"][0]

    def image(self, pixels: Tensor) -> Tensor:
        embed = "transformer.patch_embed.proj"
        x = pixels[None].double() / 127.5 - 1
        x = F.conv2d(x, self.w[f"{embed}.weight"], self.w[f"{embed}.bias"], stride=self.config.patch_size)
        x = torch.cat([self.w["transformer.cls_token"][0], x[0].flatten(1).T])
        return x + self.w["token_type_embeddings.weight"][1]

    def attention(self, x: Tensor, tokens: list[Token], layer: int) -> Tensor:
        name, heads, size = f"transformer.blocks.{layer}.attn", self.config.heads, self.config.dim // self.config.heads
        q, k, v = (x @ w.T for w in self.w[f"{name}.qkv.weight"].chunk(3))
        q, v = q + self.w[f"{name}.q_bias"], v + self.w[f"{name}.v_bias"]
        rows = torch.tensor([[relative_row(a, b, self.config.grid, LONGEST) for b in tokens] for a in tokens])
        parts = []
        for head in range(heads):
            span = slice(head * size, (head + 1) * size)
            bias = self.w["relative_position_bias_table"][:, layer * heads + head][rows]
            parts.append(torch.softmax(q[:, span] @ k[:, span].T / math.sqrt(size) + bias, dim=-1) @ v[:, span])
        return torch.cat(parts, dim=1) @ self.w[f"{name}.proj.weight"].T + self.w[f"{name}.proj.bias"]

    def branch(self, x: Tensor, layer: int, which: str) -> Tensor:
        block = f"transformer.blocks.{layer}"
        x = F.linear(self.norm(x, f"{block}.norm2_{which}"), *self.pair(f"{block}.mlp_{which}.fc1"))
        return F.linear(F.gelu(x), *self.pair(f"{block}.mlp_{which}.fc2"))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.w[f"{name}.weight"], self.w[f"{name}.bias"]

    def __call__(self, ids: Tensor | None, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Final states of the image tokens and of the text tokens."""
        nothing = torch.zeros(0, self.config.dim, dtype=torch.float64)
        text = nothing if ids is None else self.text(ids)
        image = nothing if pixels is None else self.image(pixels)
        tokens = tokens_of("text", len(text)) + tokens_of("image", len(image))
        x = torch.cat([text, image])
        for layer in range(self.config.layers):
            block = f"transformer.blocks.{layer}"
            update = self.attention(self.norm(x, f"{block}.norm1"), tokens, layer)
            x = x + self.w[f"{block}.gamma_1"] * update
            fused = len(text) > 0 and len(image) > 0 and layer >= self.config.layers - self.config.vl_layers
            spans = {"vl": x} if fused else {"text": x[: len(text)], "imag": x[len(text) :]}
            branches = torch.cat([self.branch(part, layer, which) for which, part in spans.items()])
            x = x + self.w[f"{block}.gamma_2"] * branches
        x = self.norm(x, "transformer.norm")
        return x[len(text) :], x[: len(text)]


def wanted_states(weights: dict[str, Tensor], stream: StreamName, batch: Batch, lengths: list[int]) -> Tensor:
    reference = Reference(weights, CONFIG)
    texts = [None] * 3 if stream == "image" else list(torch.split(batch.text_ids_T, lengths))
    images = [None] * 3 if stream == "text" else list(batch.pixels_ICHW)
    states = [reference(ids, pixels) for ids, pixels in zip(texts, images, strict=True)]
    return torch.cat([image for image, _ in states] + [text for _, text in states])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("stream", STREAMS)
def test_states_equal_the_reference(stream: StreamName, dtype: torch.dtype, tolerance: float) -> None:
    weights, lengths = random_vlmo(CONFIG), [7, 3, 24]
    encoder = Encoder(CONFIG, VOCAB).to(dtype).eval()
    randomise(encoder)
    missing, unexpected = encoder.load_state_dict(ours_of(weights, CONFIG), strict=False)
    assert (missing, unexpected) == (["embeddings.image.mask"], [])
    batch = batch_of(stream, lengths, CONFIG)
    batch.patch_mask_IP.zero_()
    got = encoder(batch).states_TD
    wanted = wanted_states({n: w.to(dtype).double() for n, w in weights.items()}, stream, batch, lengths)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_the_reference_uses_every_kind_of_row() -> None:
    tokens = tokens_of("image", 17) + tokens_of("text", 24)
    used = {relative_row(query, key, CONFIG.grid, LONGEST) for query, key in product(tokens, tokens)}
    too_far = {54 + LONGEST - 2 + d for d in range(2 - LONGEST, LONGEST - 1) if abs(d) > 22}
    assert used == set(range(52 + 2 + 2 * LONGEST)) - too_far
