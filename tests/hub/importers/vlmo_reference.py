"""VLMo written out straight from the paper (arXiv 2111.02358) and the published keys, one sequence at a time.

Nothing of it is shared with the encoder: relative positions are looked up pair by pair, attention is a softmax of a
matrix, and the text stands before the image, as in the published code.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.support import Token, relative_row

TEXT_LENGTH = 196
"""Tokens of a text that the published relative tables are made for."""


@dataclass(frozen=True)
class Sizes:
    """Of a small VLMo."""

    width: int = 24
    heads: int = 3
    layers: int = 3
    hidden: int = 40
    rows: int = 50
    grid: int = 4
    patch: int = 4
    vl_layers: int = 1
    text: int = 20
    """Rows of the absolute text positions."""
    relative: bool = True

    @property
    def distances(self) -> int:
        """Within an image."""
        return (2 * self.grid - 1) ** 2 + 3


def random_state(sizes: Sizes) -> dict[str, Tensor]:
    """Random weights under the published keys."""
    width, patch = sizes.width, sizes.patch
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.cls_token": (1, 1, width),
        "transformer.patch_embed.proj.weight": (width, 3, patch, patch),
        "transformer.patch_embed.proj.bias": (width,),
        "token_type_embeddings.weight": (2, width),
        "text_embeddings.word_embeddings.weight": (sizes.rows, width),
        "text_embeddings.position_embeddings.weight": (sizes.text, width),
        "text_embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    if sizes.relative:
        rows = sizes.distances + 2 * TEXT_LENGTH + 2
        shapes["relative_position_bias_table"] = (rows, sizes.heads * sizes.layers)
    else:
        shapes["transformer.pos_embed"] = (1, 1 + sizes.grid**2, width)
    norms = ["transformer.norm", "text_embeddings.LayerNorm"]
    for number in range(sizes.layers):
        block = f"transformer.blocks.{number}"
        networks = ["imag", "text", *(["vl"] if number >= sizes.layers - sizes.vl_layers else [])]
        norms += [f"{block}.norm1", *(f"{block}.norm2_{name}" for name in networks)]
        shapes |= {f"{block}.attn.qkv.weight": (3 * width, width), f"{block}.attn.proj.weight": (width, width)}
        shapes |= {f"{block}.attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")}
        if sizes.relative:
            shapes |= {f"{block}.gamma_{number}": (width,) for number in (1, 2)}
        for name in networks:
            shapes |= {
                f"{block}.mlp_{name}.fc1.weight": (sizes.hidden, width),
                f"{block}.mlp_{name}.fc1.bias": (sizes.hidden,),
            }
            shapes |= {
                f"{block}.mlp_{name}.fc2.weight": (width, sizes.hidden),
                f"{block}.mlp_{name}.fc2.bias": (width,),
            }
    shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    torch.manual_seed(0)
    return {key: torch.randn(shape) * 0.2 for key, shape in shapes.items()}


@dataclass(frozen=True)
class Reference:
    """VLMo's forward pass."""

    sizes: Sizes
    state: dict[str, Tensor]

    @torch.no_grad()
    def __call__(self, ids: Tensor | None, pixels: Tensor | None) -> Tensor:
        """Final states (text tokens, then image tokens; D) of one text, one image (3, H, W), or the pair."""
        text = None if ids is None else self._text(ids)
        image = None if pixels is None else self._image(pixels)
        x_TD = torch.cat([part for part in (text, image) if part is not None])
        words = 0 if text is None else len(text)
        kind = "vl" if text is not None and image is not None else "text" if image is None else "imag"
        for number in range(self.sizes.layers):
            x_TD = self._block(x_TD, number, kind, words)
        return self._norm(x_TD, "transformer.norm", 1e-6)

    def _text(self, ids: Tensor) -> Tensor:
        state, text = self.state, "text_embeddings"
        x = state[f"{text}.word_embeddings.weight"][ids] + state[f"{text}.token_type_embeddings.weight"][0]
        if not self.sizes.relative:
            x = x + state[f"{text}.position_embeddings.weight"][: len(ids)]
        return self._norm(x, f"{text}.LayerNorm", 1e-12) + state["token_type_embeddings.weight"][0]

    def _image(self, pixels: Tensor) -> Tensor:
        state, proj = self.state, "transformer.patch_embed.proj"
        patches = F.conv2d(pixels[None], state[f"{proj}.weight"], state[f"{proj}.bias"], stride=self.sizes.patch)
        x = torch.cat([state["transformer.cls_token"][0], patches[0].flatten(1).T])
        if not self.sizes.relative:
            x = x + state["transformer.pos_embed"][0]
        return x + state["token_type_embeddings.weight"][1]

    def _block(self, x: Tensor, number: int, kind: str, words: int) -> Tensor:
        block = f"transformer.blocks.{number}"
        attended = self._attention(self._norm(x, f"{block}.norm1", 1e-6), number, words)
        x = x + self._scale(block, 1) * attended
        if kind == "vl" and f"{block}.mlp_vl.fc1.weight" not in self.state:
            out = torch.cat([self._network(x[:words], block, "text"), self._network(x[words:], block, "imag")])
        else:
            out = self._network(x, block, kind)
        return x + self._scale(block, 2) * out

    def _scale(self, block: str, number: int) -> Tensor | float:
        return self.state.get(f"{block}.gamma_{number}", 1.0)

    def _network(self, x: Tensor, block: str, name: str) -> Tensor:
        hidden = F.gelu(self._linear(self._norm(x, f"{block}.norm2_{name}", 1e-6), f"{block}.mlp_{name}.fc1"))
        return self._linear(hidden, f"{block}.mlp_{name}.fc2")

    def _attention(self, x: Tensor, number: int, words: int) -> Tensor:
        name, heads = f"transformer.blocks.{number}.attn", self.sizes.heads
        q_bias, v_bias = self.state[f"{name}.q_bias"], self.state[f"{name}.v_bias"]
        q, k, v = (x @ self.state[f"{name}.qkv.weight"].T + torch.cat([q_bias, 0 * q_bias, v_bias])).chunk(3, dim=1)
        out = []
        for head in range(heads):
            part = slice(head * (width := self.sizes.width // heads), (head + 1) * width)
            logits = q[:, part] @ k[:, part].T / math.sqrt(width)
            if self.sizes.relative:
                logits = logits + self._bias(len(x), words, number * heads + head)
            out.append(logits.softmax(1) @ v[:, part])
        return self._linear(torch.cat(out, dim=1), f"{name}.proj")

    def _bias(self, tokens: int, words: int, column: int) -> Tensor:
        """(tokens, tokens), one entry at a time."""
        table = self.state["relative_position_bias_table"][:, column]
        return torch.stack([torch.stack([table[self._row(q, k, words)] for k in range(tokens)]) for q in range(tokens)])

    def _row(self, query: int, key: int, words: int) -> int:
        """The row of the table for two tokens; the first `words` are the text's."""
        return relative_row(self._token(query, words), self._token(key, words), self.sizes.grid, TEXT_LENGTH)

    @staticmethod
    def _token(number: int, words: int) -> Token:
        return ("text", number) if number < words else ("image", number - words)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]
