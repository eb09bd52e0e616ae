"""Names of tensors, in memory and on disk.

In memory the experts of a layer are one tensor `P.experts.NAME` of shape (E, ...); on disk each is a key of its own,
`P.experts.17.NAME`, so that any number of ranks can read their shares. A tensor without dimensions (an optimiser's
step count) belongs to all experts of its layer and is not split. E: experts.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmoe_core.errors import CheckpointError
from vlmoe_core.moe.share import Share

EXPERTS = "experts"


def disk_names(name: str, share: Share | None) -> dict[str, int | None]:
    """The names on disk of a tensor in memory, each with its row: one an expert of the share, or only its own."""
    if share is None:
        return {name: None}
    return {expert_name(name, number): row for row, number in enumerate(share.numbers)}


def fuse(tensors: list[Tensor], name: str, parts: tuple[str, ...]) -> Tensor:
    """The tensor `name` from those of its `parts`, as `group_experts` names them."""
    return tensors[0] if parts == (name,) else torch.stack(tensors)


def group_experts(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each name in memory its names on disk: of experts 0..E-1 in order, or just itself.

    Raises:
        CheckpointError: an expert is missing, or tensors of one layer have different numbers of experts.
    """
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        expert = expert_of(name)
        groups.setdefault(fused_name(name), {})[-1 if expert is None else expert] = name
    _check_complete(groups)
    return {fused: tuple(parts[expert] for expert in sorted(parts)) for fused, parts in groups.items()}


def expert_name(fused: str, expert: int) -> str:
    """The name on disk of one expert's part: P.experts.NAME -> P.experts.17.NAME."""
    parts = fused.split(".")
    at = parts.index(EXPERTS) + 1
    return ".".join([*parts[:at], str(expert), *parts[at:]])


def fused_name(name: str) -> str:
    """The name in memory of what has this name on disk: P.experts.17.NAME -> P.experts.NAME."""
    if expert_of(name) is None:
        return name
    parts = name.split(".")
    at = parts.index(EXPERTS) + 1
    return ".".join([*parts[:at], *parts[at + 1 :]])


def layer_of(name: str) -> str | None:
    """The layer P of a name P.experts.NAME, with or without an expert's number; None where there are no experts."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(EXPERTS)]) if EXPERTS in parts[:-1] else None


def expert_of(name: str) -> int | None:
    """The expert's number in a name on disk; None where there is none."""
    parts = name.split(".")
    if EXPERTS not in parts[:-2]:
        return None
    number = parts[parts.index(EXPERTS) + 1]
    return int(number) if number.isascii() and number.isdigit() else None


def _check_complete(groups: Mapping[str, Mapping[int, str]]) -> None:
    counts: dict[str, tuple[int, str]] = {}
    for fused, parts in groups.items():
        if -1 in parts:
            if len(parts) > 1:
                raise CheckpointError(f"'{fused}' is there both whole and split over experts")
            continue
        lost = sorted(set(range(max(parts) + 1)) - set(parts))
        if lost:
            raise CheckpointError(f"'{expert_name(fused, lost[0])}' is missing: there are experts up to {max(parts)}")
        count, first = counts.setdefault(layer_of(fused) or "", (len(parts), fused))
        if count != len(parts):
            raise CheckpointError(f"'{fused}' has {len(parts)} experts, but '{first}' of the same layer has {count}")
