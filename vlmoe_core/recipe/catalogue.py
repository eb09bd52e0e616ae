"""The recipes that ship with the package, by name: `quickstart/pretrain`."""

from dataclasses import dataclass
from pathlib import Path

from vlmoe_core.errors import UsageError

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Catalogue:
    """A folder of recipes; a recipe's name is its path in it without `.yaml`."""

    root: Path

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(path.relative_to(self.root).with_suffix("").as_posix() for path in self.root.rglob("*.yaml"))

    def path(self, name: str) -> Path | None:
        """The file of that name; None if there is no such recipe."""
        return self.root / f"{name}.yaml" if name in self.names() else None

    def name_of(self, path: Path) -> str | None:
        """The name of a file that lies in the catalogue; None for any other."""
        full, root = path.resolve(), self.root.resolve()
        return full.relative_to(root).with_suffix("").as_posix() if full.is_relative_to(root) else None

    def find(self, name_or_path: str) -> Path:
        """The file that a RECIPE argument means: an existing path, else a name of the catalogue.

        Raises:
            UsageError: neither; the message names what would work.
        """
        path = Path(name_or_path)
        if path.is_file():
            return path
        shipped = self.path(name_or_path)
        if shipped is not None:
            return shipped
        raise UsageError(self._not_found(name_or_path))

    def summaries(self) -> dict[str, str]:
        """Name -> first line of the head comment."""
        return {name: summary((self.root / f"{name}.yaml").read_text("utf-8")) for name in self.names()}

    def _not_found(self, typed: str) -> str:
        names = self.names()
        if Path(typed).is_dir():
            return f"'{typed}' is a folder, not a recipe; name a YAML file in it"
        if not typed.endswith(_SUFFIXES):
            return f"no recipe '{typed}': no file here and no shipped recipe has that name; {_nearest(typed, names)}"
        inner = Path(typed).with_suffix("").as_posix()
        for name in sorted(names, key=len, reverse=True):
            if inner == name or inner.endswith(f"/{name}"):
                return f"'{typed}' is no file here; the shipped recipe of that name is '{name}', without .yaml"
        return f"'{typed}' is no file; paths start from the working folder. Shipped recipes: {_nearest(inner, names)}"


def _nearest(word: str, names: list[str]) -> str:
    # Only a mistake needs pydantic, which vlmoe_core.config imports.
    from vlmoe_core.config import nearest

    return nearest(word, names)


def head_comment(text: str) -> str:
    """The lines that open a recipe with `#`: what it is, command, hardware, time, expected result."""
    lines = text.removeprefix("\ufeff").splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(f"{line}\n" for line in lines[:count])


def summary(text: str) -> str:
    """The first line of the head comment, without its `#`."""
    return head_comment(text).partition("\n")[0].lstrip("#").strip()


def expected_time(text: str) -> str | None:
    """What the head comment of a recipe says after `Time:`; null where it says nothing."""
    lines = (line.lstrip("# ") for line in head_comment(text).splitlines())
    return next((line.removeprefix("Time:").strip() for line in lines if line.startswith("Time:")), None)


def shipped() -> Catalogue:
    """The catalogue inside the installed package, or the folder `recipes` of a checkout."""
    packaged = Path(__file__).parent / "shipped"
    return Catalogue(packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes")
