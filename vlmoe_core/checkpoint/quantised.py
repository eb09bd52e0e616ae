"""Weights of 8 bits: whole numbers, and beside them one scale for each output channel.

A quantised tensor `X` is int8 (..., O, I), and `X_scale` float32 (..., O); a weight is the product of its number and
its channel's scale, rounded once to float32. So an expert on disk has `P.experts.17.NAME` (O, I) and
`P.experts.17.NAME_scale` (O), as its layer in memory has `P.experts.NAME` (E, O, I) and `P.experts.NAME_scale` (E, O).
The index of the shards lists what is quantised; a name alone says nothing.

E: experts; O and I: output and input width of a linear map.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = "_scale"


@dataclass(frozen=True, eq=False)
class QuantisedTensors(Mapping[str, Tensor]):
    """Tensors by name, those that are quantised as int8 with their scales beside them."""

    tensors: Mapping[str, Tensor]
    """All of them, scales included."""
    quantised: frozenset[str]
    """The names of those that are quantised, as they stand in memory: experts fused."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def scale_name(name: str) -> str:
    """The name of a quantised tensor's scales."""
    return name + SCALE


def dequantise(numbers: Tensor, scale: Tensor) -> Tensor:
    """int8 (..., O, I) and float32 (..., O) -> float32 (..., O, I)."""
    return numbers.to(torch.float32) * scale.unsqueeze(-1)


def dequantised(state: QuantisedTensors) -> dict[str, Tensor]:
    """The tensors that a model loads from `state`: float32 for what is quantised, ties kept, no scales."""
    found: dict[int, Tensor] = {}
    scales = {scale_name(name) for name in state.quantised}
    for name in state.quantised:
        if id(state[name]) not in found:
            found[id(state[name])] = dequantise(state[name], state[scale_name(name)])
    return {name: found.get(id(tensor), tensor) for name, tensor in state.items() if name not in scales}
