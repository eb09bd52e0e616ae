"""From a name or a file to a validated recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmoe_core.errors import RecipeError, UsageError
from vlmoe_core.recipe.catalogue import Catalogue, head_comment, shipped
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.mistakes import validated
from vlmoe_core.recipe.overrides import apply_overrides
from vlmoe_core.recipe.tree import Node, merged, plain
from vlmoe_core.recipe.yaml12 import dump, parse


@dataclass(frozen=True)
class RecipeText:
    """A recipe that was read and merged, but not yet validated."""

    name: str
    """Its name in the catalogue, else the stem of its file."""
    path: Path
    """Its file."""
    text: str
    """YAML as a user would own it: `extends` and overrides merged in, the head comment kept."""
    tree: Node
    """The values, each with the place where it was written."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe, and where it comes from."""

    recipe: Recipe
    """What a run is."""
    name: str
    """Its name in the catalogue, else the stem of its file."""
    text: str
    """YAML as a user would own it: `extends` and overrides merged in, the head comment kept."""
    path: Path
    """Its file."""


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), catalogue: Catalogue | None = None) -> LoadedRecipe:
    """Read, merge, override and validate a recipe.

    Args:
        name_or_path: an existing file, else a name of the catalogue.
        overrides: `a.b=value`, each beats the file; a later one beats an earlier one.
        catalogue: where names and `extends` are looked up; None: the shipped recipes.

    Raises:
        UsageError: no such recipe.
        RecipeError: it is not valid; a line for each mistake, with file and line or with the override.
    """
    read = read_recipe(name_or_path, overrides, catalogue)
    return LoadedRecipe(validated(Recipe, read.tree, str(read.path)), read.name, read.text, read.path)


def load_model_recipe(path: Path) -> ModelRecipe:
    """The recipe of a model: of the run that trained it, or of an imported encoder, which had none. Errors likewise."""
    read = read_recipe(str(path))
    trained = any(read.tree.child(aim) is not None for aim in ("objective", "task"))
    return validated(Recipe if trained else ModelRecipe, read.tree, str(read.path))


def read_recipe(name_or_path: str, overrides: Sequence[str] = (), catalogue: Catalogue | None = None) -> RecipeText:
    """Read, merge and override a recipe without validating its values; arguments and errors as for `load_recipe`."""
    catalogue = catalogue or shipped()
    path = catalogue.find(name_or_path)
    text = _read(path)
    own = _parse(text, path)
    tree = apply_overrides(_extended(own, path, catalogue), overrides)
    if overrides or own.child("extends"):
        sections = [head_comment(text), *(dump({key: value}) for key, value in plain(tree).items())]
        text = "\n".join(section for section in sections if section)
    return RecipeText(catalogue.name_of(path) or path.stem, path, text, tree)


def copy_recipe(
    name_or_path: str, target: Path, *, overwrite: bool = False, catalogue: Catalogue | None = None
) -> None:
    """Write a recipe's merged text to a file.

    Raises:
        UsageError: no such recipe; the target exists and `overwrite` is not asked for; it can't be written.
    """
    text = read_recipe(name_or_path, (), catalogue).text
    if target.is_dir():
        raise UsageError(f"{target} is a folder; name the file to write, such as {target / 'my.yaml'}")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; replace it with --force, or choose another name")
    try:
        target.write_bytes(text.encode())
    except OSError as error:
        raise UsageError(f"{target} can't be written: {error.strerror}") from error


def dump_recipe(recipe: ModelRecipe) -> str:
    """YAML of the whole recipe, defaults included; it loads back as an equal recipe."""
    return dump(recipe.model_dump(mode="json"))


def _extended(own: Node, path: Path, catalogue: Catalogue) -> Node:
    """The tree merged over the recipe that it extends, if it does."""
    extends = own.child("extends")
    if extends is None:
        return own
    if not isinstance(extends.value, str):
        raise RecipeError(f"{extends.place}: extends: must name one recipe, not {plain(extends)!r}")
    base_path = _base_path(extends, path, catalogue)
    base = _parse(_read(base_path), base_path)
    second = base.child("extends")
    if second is not None:
        raise RecipeError(
            f"{extends.place}: extends: '{extends.value}' itself extends '{plain(second)}' ({second.place}); "
            "one level only: extend that one, or write the lines out"
        )
    return merged(base, Node({key: value for key, value in own.value.items() if key != "extends"}, own.place))


def _base_path(extends: Node, path: Path, catalogue: Catalogue) -> Path:
    beside = path.parent / extends.value
    found = beside if beside.is_file() else catalogue.path(extends.value)
    if found is None:
        names = ", ".join(catalogue.names())
        raise RecipeError(
            f"{extends.place}: extends: '{extends.value}' is no file beside it and no shipped recipe; known: {names}"
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}") from error


def _parse(text: str, path: Path) -> Node:
    tree = parse(text, str(path))
    if tree is None or tree.value is None:
        raise RecipeError(f"{path}: the file holds no recipe; `vlmoe recipes show quickstart/pretrain` prints one")
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else "one word"
        raise RecipeError(f"{tree.place}: a recipe is a mapping of keys such as 'model:' and 'data:', not {kind}")
    return tree
