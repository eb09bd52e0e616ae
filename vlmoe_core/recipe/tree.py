"""A recipe before validation: a tree of values that know where each was written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Node:
    """One value of a recipe: a mapping or a list of nodes, or a scalar."""

    value: Any
    """dict[str, Node], list[Node], or None, bool, int, float, str."""
    place: str
    """Where it was written: `my.yaml:12`, or `--set train.steps=10`."""
    overridden: bool = False
    """Whether a `--set` wrote it."""

    def child(self, key: str | int) -> "Node | None":
        """The node under a key or index; None where there is none."""
        found: Node | None = None
        if isinstance(self.value, dict):
            found = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            found = self.value[key]
        return found


def plain(node: Node) -> Any:
    """The same values as ordinary mappings, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def merged(base: Node, over: Node) -> Node:
    """Mappings are merged key by key, in the order of `base`; lists and scalars of `over` replace those of `base`."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    values = dict(base.value)
    for key, child in over.value.items():
        values[key] = merged(values[key], child) if key in values else child
    return Node(values, over.place, over.overridden)


def nearest_node(root: Node, path: Sequence[str | int]) -> Node:
    """The node at `path`, or the deepest one on the way to it."""
    node = root
    for key in path:
        child = node.child(key)
        if child is None:
            return node
        node = child
    return node


def descendants(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """All nodes below `node`, with their paths from it."""
    keys = node.value if isinstance(node.value, dict) else range(len(node.value) if isinstance(node.value, list) else 0)
    for key in keys:
        child = node.value[key]
        yield (*path, key), child
        yield from descendants(child, (*path, key))


def dotted(path: Sequence[str | int]) -> str:
    """A path as it is typed: `data.train.pair.0.path`."""
    return ".".join(map(str, path))
