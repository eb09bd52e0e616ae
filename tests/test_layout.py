"""Who may import whom: the house has floors, and nothing stands on what is above it.

A room is a folder of vlmoe_core. Imports inside functions count as well.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, CLI = ROOT / "vlmoe_core", ROOT / "vlmoe_cli"

BENEATH = {
    "data": (),
    "moe": (),
    "model": ("data", "moe"),
    "tokenizers": ("model",),
    "objectives": ("model", "tokenizers"),
    "tasks": ("objectives",),
    "checkpoint": ("tasks",),
    "train": ("checkpoint",),
    "analysis": ("train",),
    "hub": ("analysis",),
}
"""Each room with the rooms right beneath it; it may use those and all that is beneath them."""
SEE_RECIPES = {"train", "analysis", "hub"}
"""Rooms that see a whole recipe."""
FOR_ALL = {f"vlmoe_core.{name}" for name in ("config", "decimals", "errors", "environment", "hf", "tensor_file")}
"""Files beside the rooms that every room may use."""

FILES = sorted(CORE.rglob("*.py")) + sorted(CLI.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path, *, whole: bool = True) -> Iterator[str]:
    """The modules that a file imports; `whole`: also inside functions."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in MODULES else module


def room_of(module: str) -> str | None:
    """The room of vlmoe_core that a module lies in; None: beside the rooms, or elsewhere."""
    parts = module.split(".")
    return parts[1] if parts[0] == "vlmoe_core" and len(parts) > 1 and (CORE / parts[1]).is_dir() else None


def allowed_rooms(room: str) -> set[str]:
    """A room itself and everything beneath it."""
    return {room}.union(*(allowed_rooms(lower) for lower in BENEATH[room]))


def is_config(module: str) -> bool:
    return module.split(".")[-1] == "config"


def ours(path: Path) -> set[str]:
    return {module for module in imports(path) if module.split(".")[0] in ("vlmoe_core", "vlmoe_cli")}


def rooms() -> set[str]:
    return {path.parent.name for path in CORE.glob("*/__init__.py")}


def test_every_room_has_its_floor() -> None:
    assert rooms() - {"recipe"} <= BENEATH.keys()


@pytest.mark.parametrize("room", sorted(rooms() - {"recipe"}))
def test_a_room_stands_on_what_is_beneath_it(room: str) -> None:
    allowed = allowed_rooms(room) | ({"recipe"} if room in SEE_RECIPES else set())
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in sorted((CORE / room).rglob("*.py"))
        for module in sorted(ours(path))
        if room_of(module) not in allowed and module not in FOR_ALL
    ]
    assert not wrong


def test_recipe_stands_on_configs_alone() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in (CORE / "recipe").rglob("*.py")
        for module in ours(path)
        if room_of(module) != "recipe" and not is_config(module) and module not in FOR_ALL
    ]
    assert not wrong


def test_the_library_never_imports_the_command_line() -> None:
    assert not [name_of(path) for path in CORE.rglob("*.py") if any(m.startswith("vlmoe_cli") for m in ours(path))]


def test_files_beside_the_rooms_stand_on_no_room() -> None:
    assert not [
        f"{name_of(path)} imports {module}" for path in CORE.glob("*.py") for module in ours(path) if room_of(module)
    ]


@pytest.mark.parametrize("path", sorted(CORE.rglob("config.py")), ids=name_of)
def test_a_config_imports_configs_pydantic_and_the_standard_library(path: Path) -> None:
    tops = {"pydantic", "pydantic_core", *sys.stdlib_module_names}
    wrong = [m for m in imports(path) if m.split(".")[0] not in tops and not (m in MODULES and is_config(m))]
    assert not wrong


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name_of)
def test_init_files_hold_a_docstring_at_most(path: Path) -> None:
    statements = ast.parse(path.read_text("utf-8")).body
    assert not [
        node for node in statements if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]


def test_every_folder_of_python_files_is_a_package() -> None:
    assert not {path.parent for path in FILES} - {path.parent for path in FILES if path.name == "__init__.py"}


def test_no_circles() -> None:
    graph = {name: {module for module in ours(path) if module != name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_help_needs_no_heavy_import() -> None:
    heavy, seen, waiting = set(), set(), ["vlmoe_cli.main"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for module in imports(MODULES[name], whole=False):
            if module.split(".")[0] in {"torch", "pydantic", "rich", "numpy", "PIL"}:
                heavy.add(f"{name} imports {module}")
            elif module in MODULES and module not in seen:
                waiting.append(module)
    assert len(seen) > 5
    assert not heavy
