"""Dotted overrides: `--set train.steps=100`, `--set data.train.pair.0.path=captions.jsonl`."""

from collections.abc import Sequence
from functools import reduce

from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.tree import KeyPath, Node, dotted
from vlmoe_core.recipe.yaml12 import parse


def apply_overrides(root: Node, overrides: Sequence[str]) -> Node:
    """The tree with every `key=value` set, in order; a later one wins.

    The value is YAML: a scalar, or a list or mapping in brackets, that replaces what stood there. Mappings on the way
    are made where they are missing; an index must name an entry that a list has.

    Raises:
        RecipeError: no `=`, an empty key, a value that is not YAML, a way through a scalar, an index outside its list.
    """
    return reduce(_apply, overrides, root)


def _apply(root: Node, override: str) -> Node:
    place = f"--set {override}"
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals:
        raise RecipeError(f"{place}: give it as key=value, such as --set train.steps=100")
    if not all(keys):
        raise RecipeError(f"{place}: the key is empty or has an empty part; write it as a.b=value")
    value = parse(text, place, numbered=False, overridden=True) or Node(None, place, overridden=True)
    return _set(root, keys, value, ())


def _set(node: Node, keys: Sequence[str], value: Node, above: KeyPath) -> Node:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        index = _index(node, key, value, above)
        items = [*node.value[:index], _set(node.value[index], rest, value, (*above, index)), *node.value[index + 1 :]]
        return Node(items, node.place, node.overridden)
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(f"{value.place}: {dotted(above)} is {node.value!r} ({node.place}), it has no '{key}'")
    known = node.value or {}
    missing = Node(None, value.place, overridden=True)
    child = _set(known.get(key, missing), rest, value, (*above, key))
    written = missing if node.value is None else node
    return Node({**known, key: child}, written.place, written.overridden)


def _index(node: Node, key: str, value: Node, above: KeyPath) -> int:
    count = len(node.value)
    if key.isascii() and key.isdigit() and int(key) < count:
        return int(key)
    fits = f"give an index from 0 to {count - 1}" if count else "it is empty"
    raise RecipeError(f"{value.place}: {dotted(above)} is a list, '{key}' is none of its entries; {fits}")
