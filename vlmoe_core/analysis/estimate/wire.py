"""Bytes on the wire: what one process sends, or receives if that is more, in collectives that spare the wire.

All-reduce, all-gather and reduce-scatter go round a ring (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms
for clusters of workstations, 2009); in an all-to-all each process talks with each other one. What a process keeps for
itself is not on the wire.
"""

from collections.abc import Iterable, Sequence

from vlmoe_core.analysis.estimate.routing import Group

COUNT = 4
"""Bytes of the number of tokens for an expert."""


def all_reduce(size: int, ranks: int) -> int:
    """To sum a tensor of `size` bytes over all ranks."""
    return 2 * size * (ranks - 1) // ranks


def all_gather(size: int, ranks: int) -> int:
    """To gather a tensor that has `size` bytes as a whole."""
    return size * (ranks - 1) // ranks


def reduce_scatter(size: int, ranks: int) -> int:
    """To sum a tensor of `size` bytes of which each rank keeps its part."""
    return size * (ranks - 1) // ranks


def all_to_all(sent: Sequence[int], received: Sequence[int], rank: int) -> int:
    """To send so many bytes to each rank, and receive so many from each."""
    return max(sum(sizes) - sizes[rank] for sizes in (sent, received))


def exchanges(checkpointed: bool) -> int:
    """All-to-alls of tokens in a sparse layer: there and back, in the forward and in the backward pass, and once more
    in the forward pass that activation checkpointing repeats."""
    return 6 if checkpointed else 4


def token_bytes(groups: Iterable[Group], row: int, ranks: int, checkpointed: bool) -> int:
    """Tokens to their experts and back, in one micro-batch, if all experts get the same.

    Args:
        groups: the routing groups of a micro-batch.
        row: bytes of a token.
        ranks: processes that share the experts.
        checkpointed: whether there is activation checkpointing.
    """
    rows = sum(group.layers * _even_rows(group, ranks) for group in groups)
    return exchanges(checkpointed) * rows * row * (ranks - 1)


def count_bytes(groups: Iterable[Group], ranks: int, checkpointed: bool) -> int:
    """The numbers of tokens for each expert, in one micro-batch; arguments as in `token_bytes`."""
    numbers = sum(group.layers * group.experts for group in groups)
    return (2 if checkpointed else 1) * numbers // ranks * (ranks - 1) * COUNT


def _even_rows(group: Group, ranks: int) -> int:
    """Rows of a group from the first process of a group to each process, the remainder going to the first ones."""
    rows = -(-group.choices // ranks)
    return rows if group.capacity is None else min(rows, group.experts // ranks * group.capacity)
