"""VQ-KD written out straight from the paper (arXiv 2208.06366, section 2.2) and the published keys.

Plain functions on the published tensors; nothing of it is shared with the package: the embeddings are convolutions,
attention is a softmax of a matrix, one head at a time, and a token is the code at the smallest distance.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of a small tokenizer."""

    width: int = 24
    heads: int = 3
    layers: int = 3
    decoder_layers: int = 3
    patch: int = 4
    grid: int = 4
    codes: int = 40
    code_dim: int = 8
    teacher: int = 20


BASE = Sizes(768, 12, 12, 3, 16, 14, 8192, 32, 512)
"""vqkd_encoder_base_decoder_3x768x12_clip."""


def published_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a file for tokenizing, what is left of the training apart."""
    d, patch, f = sizes.width, sizes.patch, sizes.code_dim
    shapes: dict[str, tuple[int, ...]] = {
        "quantize.cluster_size": (sizes.codes,),
        "quantize.embedding.weight": (sizes.codes, f),
        "quantize.embedding.cluster_size": (sizes.codes,),
        "quantize.embedding.embed_avg": (sizes.codes, f),
        "quantize.embedding.initted": (1,),
        "encoder.patch_embed.proj.weight": (d, 3, patch, patch),
        "decoder.patch_embed.proj.weight": (d, f, 1, 1),
    }
    for task, width in (("encode", f), ("decode", sizes.teacher)):
        shapes |= {f"{task}_task_layer.0.weight": (d, d), f"{task}_task_layer.0.bias": (d,)}
        shapes |= {f"{task}_task_layer.2.weight": (width, d), f"{task}_task_layer.2.bias": (width,)}
    for part, layers in (("encoder", sizes.layers), ("decoder", sizes.decoder_layers)):
        shapes |= {f"{part}.cls_token": (1, 1, d), f"{part}.pos_embed": (1, 1 + sizes.grid**2, d)}
        shapes |= {f"{part}.{name}": (d,) for name in ("patch_embed.proj.bias", "fc_norm.weight", "fc_norm.bias")}
        for block in (f"{part}.blocks.{number}" for number in range(layers)):
            shapes |= {f"{block}.norm{n}.{name}": (d,) for n in (1, 2) for name in ("weight", "bias")}
            shapes |= {f"{block}.attn.{name}": (d,) for name in ("q_bias", "v_bias", "proj.bias")}
            shapes |= {f"{block}.attn.qkv.weight": (3 * d, d), f"{block}.attn.proj.weight": (d, d)}
            shapes |= {f"{block}.mlp.fc1.weight": (4 * d, d), f"{block}.mlp.fc1.bias": (4 * d,)}
            shapes |= {f"{block}.mlp.fc2.weight": (d, 4 * d), f"{block}.mlp.fc2.bias": (d,)}
    return shapes


def random_state(sizes: Sizes) -> dict[str, Tensor]:
    """Random tensors under the published keys; the codes are unit vectors, and many are in use."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in published_shapes(sizes).items()}
    for key in state:
        if "norm" in key and key.endswith("weight"):
            state[key] += 1
        elif key.endswith("bias"):
            state[key] /= 4
    codes = "quantize.embedding.weight"
    state[codes] = state[codes] / state[codes].square().sum(1, keepdim=True).sqrt()
    state["quantize.cluster_size"] = torch.arange(1.0, sizes.codes + 1)
    state["quantize.embedding.initted"] = torch.ones(1)
    return state


def published_file(sizes: Sizes) -> dict[str, Any]:
    """What a run of beit2 saves: weights, what is left of the training among them, and other entries."""
    leftovers = {
        "teacher_model.visual.proj": torch.ones(5, 3),
        "scaling_layer.shift": torch.ones(1, 3, 1, 1),
        "loss.weight": torch.ones(2),
    }
    return {"model": random_state(sizes) | leftovers, "optimizer": {"step": 1}, "epoch": 99}


@dataclass(frozen=True)
class Reference:
    """VQ-KD's forward passes."""

    sizes: Sizes
    state: dict[str, Tensor]

    def features(self, images: Tensor) -> Tensor:
        """Unit vectors (B, N, code_dim) of images (B, 3, H, W) from 0 to 1."""
        patches = self._transformer("encoder", 2 * images - 1, self.sizes.patch)
        return self._unit(self._two_maps(patches, "encode_task_layer"))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, N) numbers of the codes at the smallest distance."""
        features, codes = self.features(images), self.state["quantize.embedding.weight"]
        distance = (features[:, :, None] - codes[None, None]).square().sum(-1)
        return distance.argmin(-1)

    def decoded(self, tokens: Tensor) -> Tensor:
        """(B, N, teacher) what the decoder makes of tokens."""
        codes = self.state["quantize.embedding.weight"][tokens]
        plane = codes.transpose(1, 2).unflatten(2, (self.sizes.grid, self.sizes.grid))
        return self._two_maps(self._transformer("decoder", plane, 1), "decode_task_layer")

    def _transformer(self, part: str, plane: Tensor, patch: int) -> Tensor:
        """(B, C, rows, columns) -> (B, N, D): the patches' states, normalised."""
        proj = f"{part}.patch_embed.proj"
        patches = F.conv2d(plane, self.state[f"{proj}.weight"], self.state[f"{proj}.bias"], stride=patch)
        cls = self.state[f"{part}.cls_token"].repeat(len(plane), 1, 1)
        x = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1) + self.state[f"{part}.pos_embed"]
        layers = self.sizes.layers if part == "encoder" else self.sizes.decoder_layers
        for block in (f"{part}.blocks.{number}" for number in range(layers)):
            x = x + self._attention(self._norm(x, f"{block}.norm1"), f"{block}.attn")
            inner = self._linear(self._norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            gelu = inner / 2 * (1 + torch.erf(inner / math.sqrt(2)))
            x = x + self._linear(gelu, f"{block}.mlp.fc2")
        return self._norm(x[:, 1:], f"{part}.fc_norm")

    def _attention(self, x: Tensor, name: str) -> Tensor:
        q_weight, k_weight, v_weight = self.state[f"{name}.qkv.weight"].chunk(3)
        q = x @ q_weight.T + self.state[f"{name}.q_bias"]
        k = x @ k_weight.T
        v = x @ v_weight.T + self.state[f"{name}.v_bias"]
        width, out = self.sizes.width // self.sizes.heads, []
        for head in range(self.sizes.heads):
            part = slice(head * width, (head + 1) * width)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
            out.append(logits.softmax(-1) @ v[..., part])
        return self._linear(torch.cat(out, dim=-1), f"{name}.proj")

    def _two_maps(self, x: Tensor, name: str) -> Tensor:
        return self._linear(self._linear(x, f"{name}.0").tanh(), f"{name}.2")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()
