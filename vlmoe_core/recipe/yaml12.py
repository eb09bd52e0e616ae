"""Reading and writing YAML by the rules of YAML 1.2's core schema (https://yaml.org/spec/1.2.2, chapter 10.3).

`no` and `on` stay words, `1e-4` is a number, `010` is ten; there are no dates, no base-60 numbers and no tags.
"""

import io
import re
from typing import Any

import yaml

from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.tree import Node

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": (re.compile(r"(?:null|Null|NULL|~|)$"), "nN~"),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+.0123456789",
    ),
}


class _TagError(yaml.MarkedYAMLError):
    """A value with a tag."""


class _Loader(yaml.SafeLoader):
    """Composes nodes only; its scalars resolve by the core schema."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose the next node; a node with a tag is refused."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _TagError(problem=f"tags ({event.tag}) are not allowed in a recipe", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _CORE.items():
    _firsts = [*_first, ""] if _name == "null" else [*_first]
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _firsts)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _firsts)


def dump(data: Any) -> str:
    """YAML text of mappings, lists and scalars; the innermost collections below the top on one line each."""
    stream = io.StringIO()
    dumper = _Dumper(stream, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    dumper.open()
    root = dumper.represent_data(data)
    if isinstance(root, yaml.CollectionNode):
        root.flow_style = False
    dumper.serialize(root)
    dumper.close()
    return stream.getvalue()


def parse(text: str, source: str, *, numbered: bool = True, overridden: bool = False) -> Node | None:
    """The tree of a YAML text; None for a text without a value.

    Args:
        source: what messages call the text, a file name or an override.
        numbered: whether places hold line numbers.
        overridden: whether the text is the value of a `--set`.

    Raises:
        RecipeError: not YAML, a tag, a duplicate key, a merge key, a key that is no word, an anchor that holds itself.
    """
    reader = _Reader(source, numbered, overridden)
    try:
        root = yaml.compose(text, Loader=_Loader)
        return None if root is None else reader.node(root, root.start_mark.line, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = reader.place(mark.line) if mark else source
        kind = "" if isinstance(error, _TagError) else "not valid YAML: "
        raise RecipeError(f"{where}: {kind}{_problem(error)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError(f"{source}: nested too deeply") from error


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in problem:
        problem += " (indent with spaces, not with tabs)"
    return problem


class _Reader:
    """Turns composed YAML nodes into a tree."""

    def __init__(self, source: str, numbered: bool, overridden: bool) -> None:
        self.source, self.numbered, self.overridden = source, numbered, overridden

    def place(self, line: int) -> str:
        return f"{self.source}:{line + 1}" if self.numbered else self.source

    def node(self, node: yaml.Node, line: int, above: tuple[int, ...]) -> Node:
        """The tree under `node`, which was named on `line` and lies inside the nodes `above`."""
        if id(node) in above:
            raise RecipeError(f"{self.place(line)}: this anchor holds itself")
        inside = (*above, id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node, inside)
        elif isinstance(node, yaml.SequenceNode):
            value = [self.node(item, item.start_mark.line, inside) for item in node.value]
        else:
            value = _scalar(node.tag, str(node.value))
        return Node(value, self.place(line), self.overridden)

    def _mapping(self, mapping: yaml.MappingNode, inside: tuple[int, ...]) -> dict[str, Node]:
        lines: dict[str, int] = {}
        values: dict[str, Node] = {}
        for key_node, value_node in mapping.value:
            line = key_node.start_mark.line
            key = self._key(key_node)
            if key in lines:
                first = f"first given on line {lines[key] + 1}; keep one of them"
                raise RecipeError(f"{self.place(line)}: duplicate key '{key}', {first}")
            lines[key] = line
            values[key] = self.node(value_node, line, inside)
        return values

    def _key(self, node: yaml.Node) -> str:
        place = self.place(node.start_mark.line)
        if not isinstance(node, yaml.ScalarNode):
            raise RecipeError(f"{place}: a key must be a word, not a list or mapping")
        if node.value == "<<" and node.style is None:
            hint = "write the lines out, or use 'extends: NAME'"
            raise RecipeError(f"{place}: merge keys (<<) are no part of YAML 1.2; {hint}")
        return str(node.value)


def _scalar(tag: str, text: str) -> Any:
    match tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
