"""Who writes what: every tensor on disk has one owner among the processes, and one file.

All processes make the same plan from what all of them offer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlmoe_core.checkpoint.manifest import dump_json
from vlmoe_core.checkpoint.names import disk_names, fused_name, group_experts
from vlmoe_core.checkpoint.offers import Offers
from vlmoe_core.errors import CheckpointError


@dataclass(frozen=True)
class Plan:
    """How one part of a checkpoint is written."""

    stem: str
    """Which part: its files' names begin so."""
    files: Sequence[Mapping[str, Sequence[str]]]
    """Of each process the shards that it writes, with the names on disk that each holds."""
    index: str
    """The text of the index: which shard holds which name, what is tied, what is quantised."""

    def owned(self, rank: int) -> frozenset[str]:
        """The names on disk that a process writes."""
        return frozenset(key for keys in self.files[rank].values() for key in keys)

    @property
    def written(self) -> frozenset[str]:
        """The names on disk that any process writes: all but those that are tied to another one."""
        return frozenset().union(*map(self.owned, range(len(self.files))))


def make_plan(stem: str, offers: Sequence[Offers], max_shard_bytes: int) -> Plan:
    """Choose for each tensor its owner, so that each process writes about as many bytes, and its file.

    Args:
        stem: the part of the checkpoint.
        offers: of each process, by rank.
        max_shard_bytes: a shard is cut before it grows beyond this.

    Raises:
        CheckpointError: nobody has some expert of a layer, or two processes differ over a tensor.
    """
    sizes, holders = _holders(offers)
    group_experts(sizes)
    tied = {name: owner for told in offers for name, owner in told.tied.items()}
    stored = {key: sizes[key] for key in sorted(sizes) if key not in tied}  # an index keeps no other order
    owners = balance(stored, holders, len(offers))
    cuts = [plan_shards(own, max_shard_bytes) for own in _by_owner(stored, owners, len(offers))]
    count, number = sum(map(len, cuts)), 0
    files: list[dict[str, list[str]]] = []
    for cut in cuts:
        files.append({shard_name(stem, number + i, count): keys for i, keys in enumerate(cut, start=1)})
        number += len(cut)
    weight_map = {key: shard for shards in files for shard, keys in shards.items() for key in keys}
    metadata: dict[str, object] = {"total_size": sum(stored.values()), "tied": tied}
    if (quantised := offers[0].quantised) is not None:
        metadata["quantised"] = [key for key in sizes if fused_name(key) in quantised]
    return Plan(stem, files, dump_json({"metadata": metadata, "weight_map": weight_map}))


def balance(sizes: Mapping[str, int], holders: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """An owner for each name among its holders: what few hold first, the larger first, to whom has fewest bytes."""
    loads, owners = [0] * ranks, {}
    for key in sorted(sizes, key=lambda key: (len(holders[key]), -sizes[key])):
        owners[key] = min(holders[key], key=loads.__getitem__)
        loads[owners[key]] += sizes[key]
    return owners


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of one shard, numbered from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Cut names, in order, into shards of at most `max_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _by_owner(sizes: Mapping[str, int], owners: Mapping[str, int], ranks: int) -> list[dict[str, int]]:
    """The bytes of what each process owns, in the same order."""
    own: list[dict[str, int]] = [{} for _ in range(ranks)]
    for key, size in sizes.items():
        own[owners[key]][key] = size
    return own


def _holders(offers: Sequence[Offers]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Bytes and holders of each name on disk: in the order of the tensors in memory, the experts by number."""
    sizes: dict[str, int] = {}
    holders: dict[str, list[int]] = {}
    for name in _names(offers):
        found: dict[str, int] = {}
        order: dict[str, int] = {}
        for rank, told in enumerate(offers):
            if (one := told.tensors.get(name)) is None:
                continue
            for key, row in disk_names(name, one.share).items():
                if found.setdefault(key, one.nbytes) != one.nbytes:
                    raise CheckpointError(f"'{key}' has {one.nbytes} bytes on process {rank}, elsewhere {found[key]}")
                order[key] = 0 if row is None or one.share is None else one.share.first + row
                holders.setdefault(key, []).append(rank)
        sizes |= {key: found[key] for key in sorted(found, key=order.__getitem__)}
    return sizes, holders


def _names(offers: Sequence[Offers]) -> Iterable[str]:
    """The names in memory on any process, as a rule the same on all, each once."""
    return dict.fromkeys(name for told in offers for name in told.tensors)
