"""int8: the weights of linear maps as whole numbers from -127 to 127, with a scale for each expert and output channel.

Symmetric: the scale is the channel's largest magnitude over 127, a weight the nearest number, the even one of two that
are equally near. So no weight moves by more than half its scale, but for the rounding of float32.

E: experts; O and I: output and input width of a linear map.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe_core.checkpoint.quantised import QuantisedTensors, scale_name
from vlmoe_core.checkpoint.shards import separate_tied
from vlmoe_core.errors import HubError

LARGEST = 127
ROUTER = "its choice of experts could flip"
NORM = "a norm"
EMBEDDING = "an embedding or position"
OTHER = "a bias, or otherwise no weight of a linear map"
REASONS = {"router": ROUTER, "embeddings": EMBEDDING, "relative": EMBEDDING}
"""Why what has such a part in its name is left as it is."""


@dataclass(frozen=True)
class QuantisedShare:
    """How much of a model is quantised; tied tensors count once."""

    values_quantised: int
    """Weights that are whole numbers now."""
    values_total: int
    """All values, scales not counted."""
    bytes_before: int
    """Of all tensors."""
    bytes_after: int
    """Likewise, scales included."""
    values_left: Mapping[str, int]
    """Values that are as they were, by the reason."""

    @property
    def share(self) -> float:
        """Of the values, from 0 to 1."""
        return self.values_quantised / self.values_total if self.values_total else 0.0


def quantise(state: Mapping[str, Tensor]) -> tuple[QuantisedTensors, QuantisedShare]:
    """The same tensors, the weights of attention, feed-forward networks, experts and heads as int8 with scales.

    Tied tensors stay tied; they are quantised only if none of their names speaks against it.

    Raises:
        HubError: a weight is infinite or not a number, or a tensor has the name of scales.
    """
    stored, tied = separate_tied(state)
    left = {name: _reason(_names_of(name, tied), tensor) for name, tensor in stored.items()}
    found = {name: quantise_weight(stored[name], name) for name, reason in left.items() if reason is None}
    tensors: dict[str, Tensor] = {}
    for name in state:
        owner = tied.get(name, name)
        if owner in found and scale_name(name) in state:
            raise HubError(f"'{scale_name(name)}' is a tensor of the model: the scales of '{name}' can't be named so")
        if owner in found:
            tensors[name], tensors[scale_name(name)] = found[owner]
        else:
            tensors[name] = stored[owner]
    quantised = frozenset(name for name in state if tied.get(name, name) in found)
    return QuantisedTensors(tensors, quantised), _share(stored, found, left)


def quantise_weight(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(..., O, I) -> int8 (..., O, I) and float32 scales (..., O), 0 for a channel of zeros.

    Raises:
        HubError: a weight is infinite or not a number.
    """
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not torch.isfinite(values).all():
        raise HubError(f"'{name}' holds values that are infinite or not numbers, which int8 has not: was it trained?")
    scale = (values.abs().amax(dim=-1) / LARGEST).to(torch.float32)
    nearest = (values / scale.unsqueeze(-1)).masked_fill(scale.unsqueeze(-1) == 0, 0.0).round()
    return nearest.clamp(-LARGEST, LARGEST).to(torch.int8), scale


def _names_of(name: str, tied: Mapping[str, str]) -> list[str]:
    return [name, *(other for other, owner in tied.items() if owner == name)]


def _reason(names: Iterable[str], tensor: Tensor) -> str | None:
    """Why a tensor of these names is left as it is; null: it is quantised."""
    parts = {part for name in names for part in name.split(".")}
    for part, reason in REASONS.items():
        if part in parts:
            return reason
    if any(part.startswith("norm") for part in parts):
        return NORM
    ends = {name.rpartition(".")[2] for name in names}
    is_matrix = tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] > 0
    return None if ends == {"weight"} and is_matrix else OTHER


def _share(
    stored: Mapping[str, Tensor], found: Mapping[str, tuple[Tensor, Tensor]], left: Mapping[str, str | None]
) -> QuantisedShare:
    by_reason: Counter[str] = Counter()
    for name, reason in left.items():
        if reason is not None:
            by_reason[reason] += stored[name].numel()
    before = {name: tensor.nbytes for name, tensor in stored.items()}
    after = {name: sum(part.nbytes for part in parts) for name, parts in found.items()}
    return QuantisedShare(
        values_quantised=sum(numbers.numel() for numbers, _ in found.values()),
        values_total=sum(tensor.numel() for tensor in stored.values()),
        bytes_before=sum(before.values()),
        bytes_after=sum((before | after).values()),
        values_left=dict(by_reason),
    )
