"""Validation of a recipe's tree, with messages that name file, line and key."""

import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlmoe_core.config import Config, Plugin, nearest
from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.tree import KeyPath, Node, descendants, dotted, nearest_node, plain

ConfigT = TypeVar("ConfigT", bound=Config)

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a word or text",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
}


@dataclass(frozen=True)
class _Mistake:
    """One error of pydantic, its location freed from the tags of unions."""

    path: KeyPath
    """Keys and indices, as in the recipe."""
    union: KeyPath | None
    """Where the value may be one of several kinds, and this error is that of one kind."""
    message: str
    """What is wrong, complete but for the value."""
    shown: str = ""
    """The value, where the message needs it."""
    about_parts: bool = False
    """Whether the message speaks of keys below the path."""


def validated(model: type[ConfigT], tree: Node, source: str) -> ConfigT:
    """The config that the tree describes.

    Args:
        source: the file, named where a mistake has no line of its own.

    Raises:
        RecipeError: a line for each mistake: `my.yaml:12: model.layrs: unknown key; did you mean 'layers'?`.
    """
    data = plain(tree)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        mistakes = [_mistake(details, model, data) for details in error.errors(include_url=False)]
    raise RecipeError("\n".join(_line(mistake, tree, source) for mistake in _without_unions(mistakes)))


def _line(mistake: _Mistake, tree: Node, source: str) -> str:
    node = nearest_node(tree, mistake.path)
    if mistake.about_parts:
        node = _culprit(node, mistake.message)
    place = source if node is tree else node.place
    key = f"{dotted(mistake.path)}: " if mistake.path else ""
    value = f", not {mistake.shown}" if mistake.shown else ""
    return f"{place}: {key}{mistake.message}{value}"


def _culprit(node: Node, message: str) -> Node:
    """The node to point at: of those below that the message names, an overridden one, else the first one."""
    named = []
    for path, below in descendants(node):
        found = re.search(rf"(?<![\w.]){re.escape(dotted(path))}(?![\w.])", message)
        if found and isinstance(path[-1], str):
            named.append((not below.overridden, found.start(), -len(path), below))
    return min(named, key=lambda entry: entry[:3])[-1] if named else node


def _without_unions(mistakes: Iterable[_Mistake]) -> list[_Mistake]:
    """One mistake for each value that fits no kind of a union: of the kind that fits best, else all kinds joined."""
    kept: list[_Mistake] = []
    for union, group in groupby(mistakes, key=lambda mistake: mistake.union):
        of_union = list(group)
        if union is None:
            kept += of_union
            continue
        inside = [mistake for mistake in of_union if len(mistake.path) > len(union)]
        joined = " or ".join([of_union[0].message, *(m.message.removeprefix("must be ") for m in of_union[1:])])
        kept += inside or [_Mistake(union, None, joined, of_union[0].shown)]
    return kept


def _mistake(error: ErrorDetails, model: type[Config], data: Any) -> _Mistake:
    path, union = _real_path(error, data)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return _Mistake(path, union, "missing; give it a value")
    if kind == "extra_forbidden":
        return _Mistake(path, union, _unknown_key(model, data, path))
    if error["loc"][-1:] == ("[key]",):
        return _Mistake(path, union, f"unknown key; known: {context.get('expected', '')}")
    if kind == "too_long":
        return _Mistake(
            path, union, f"must have at most {context['max_length']} entries, not {context['actual_length']}"
        )
    if kind == "value_error":
        return _Mistake(path, union, str(context["error"]), about_parts=True)
    expected = _EXPECTED.get(kind) or _input_should_be(error["msg"])
    if expected is None:
        return _Mistake(path, union, error["msg"], about_parts=True)
    return _Mistake(path, union, f"must be {expected}", _shown(error["input"]))


def _input_should_be(message: str) -> str | None:
    start = "Input should be "
    return message.removeprefix(start) if message.startswith(start) else None


def _shown(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _real_path(error: ErrorDetails, data: Any) -> tuple[KeyPath, KeyPath | None]:
    """The location without the names that pydantic adds for the kinds of a union, and where the first one stood."""
    path: list[str | int] = []
    union: KeyPath | None = None
    value = data
    last = len(error["loc"]) - 1
    for number, part in enumerate(error["loc"]):
        is_here = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
        if is_here:
            path.append(part)
            value = value[part]
        elif number == last and error["type"] == "missing":
            path.append(part)
        elif part != "[key]" and union is None:
            union = tuple(path)
    return tuple(path), union


def _unknown_key(model: type[Config], data: Any, path: KeyPath) -> str:
    config = _config_at(model, data, path[:-1])
    return f"unknown key; {nearest(str(path[-1]), list(config.model_fields))}" if config else "unknown key"


def _config_at(annotation: Any, data: Any, path: Sequence[str | int]) -> type[Config] | None:
    """The config class that validates the value at `path`."""
    if not path:
        return _config_class(annotation, data)
    value = data[path[0]]
    for inner in _inner(annotation, data, path[0]):
        found = _config_at(inner, value, path[1:])
        if found is not None:
            return found
    return None


def _config_class(annotation: Any, data: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if get_origin(annotation) is Annotated:
        plugins = [mark for mark in annotation.__metadata__ if isinstance(mark, Plugin)]
        return plugins[0].config_class(data) if plugins else _config_class(get_args(annotation)[0], data)
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for kind in get_args(annotation) if (found := _config_class(kind, data))), None)
    return None


def _inner(annotation: Any, data: Any, key: str | int) -> list[Any]:
    """The annotations that the value under `key` may have."""
    config = _config_class(annotation, data)
    if config is not None:
        field = config.model_fields.get(str(key))
        return (
            []
            if field is None
            else [Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation]
        )
    origin, kinds = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return [inner for kind in kinds for inner in _inner(kind, data, key)]
    if origin is Annotated:
        return _inner(kinds[0], data, key)
    return {tuple: list(kinds[:1]), list: list(kinds), dict: list(kinds[1:])}.get(origin, [])
