"""What collectives cost, by the alpha-beta model: seconds = alpha x messages + bytes / bandwidth.

Ring and tree as NCCL's own tuning reckons them (src/graph/tuning.cc). What moves inside the nodes and what moves
between them do so at the same time: the longer of the two counts, and latencies are added to it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A way between two processes."""

    message: float
    """Seconds that one message of an all-to-all adds."""
    hop: float
    """Seconds of one step of a ring or tree."""
    bandwidth: float
    """Bytes a second that a process sends."""


@dataclass(frozen=True)
class Fabric:
    """How the processes of a run are joined."""

    start: float
    """Seconds until a collective begins."""
    node: int
    """Processes of a node, each on its own GPU with its own network card."""
    inside: Link
    """Between processes of one node."""
    between: Link
    """Between nodes."""


@dataclass(frozen=True)
class Group:
    """Processes that talk with each other."""

    size: int
    """How many."""
    inside: int
    """How many of them stand in each node."""

    @property
    def nodes(self) -> int:
        """Nodes that they stand in."""
        return -(-self.size // self.inside)


@dataclass(frozen=True)
class Cost:
    """Seconds of one collective."""

    latency: float = 0.0
    """Before the first and between the bytes."""
    inside: float = 0.0
    """Bytes inside the nodes."""
    between: float = 0.0
    """Bytes between nodes, which move at the same time."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.latency + max(self.inside, self.between)


def group_of(size: int, stride: int, node: int) -> Group:
    """Processes that stand `stride` apart in the row of all processes, which fills node by node."""
    return Group(size, max(1, min(size, node // stride)))


def all_to_all(sent: float, group: Group, fabric: Fabric) -> Cost:
    """Each process sends an equal part of its `sent` bytes to each process of the group, itself included."""
    if group.size == 1:
        return Cost()
    near, far = group.inside - 1, group.size - group.inside
    latency = fabric.start + fabric.inside.message * near + fabric.between.message * far
    part = sent / group.size
    return Cost(latency, part * near / fabric.inside.bandwidth, part * far / fabric.between.bandwidth)


def all_gather(whole: float, group: Group, fabric: Fabric) -> Cost:
    """Each process ends with all `whole` bytes, of which it had an equal part."""
    if group.size == 1:
        return Cost()
    nodes = group.nodes
    hops = (group.size - nodes) * fabric.inside.hop + (nodes - 1) * fabric.between.hop
    inside = whole * (group.inside - 1) / group.inside / fabric.inside.bandwidth
    between = whole * (nodes - 1) / nodes / group.inside / fabric.between.bandwidth
    return Cost(fabric.start + hops, inside, between)


def reduce_scatter(whole: float, group: Group, fabric: Fabric) -> Cost:
    """Each process ends with the sum of an equal part of `whole` bytes: the same way as `all_gather`, backwards."""
    return all_gather(whole, group, fabric)


def all_reduce(whole: float, group: Group, fabric: Fabric) -> Cost:
    """Each process ends with the sum of `whole` bytes: both of the above, or a tree where that begins sooner."""
    if group.size == 1:
        return Cost()
    half = all_gather(whole, group, fabric)
    levels = (group.nodes - 1).bit_length()
    tree = 2 * ((group.inside - 1) * fabric.inside.hop + levels * fabric.between.hop)
    ring = 2 * (half.latency - fabric.start)
    return Cost(fabric.start + min(ring, tree), 2 * half.inside, 2 * half.between)


def left_over(seconds: float, behind: float) -> float:
    """What is still to wait for of communication that runs behind so many seconds of computation."""
    return max(0.0, seconds - behind)
