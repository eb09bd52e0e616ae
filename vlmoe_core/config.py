"""What all parts of a recipe share: frozen models that forbid unknown keys, and plug-ins found by file name."""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """A frozen part of a recipe. The string under a field says its meaning, unit and source."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def nearest(word: str, known: list[str]) -> str:
    """The hint that ends a message about an unknown word: the nearest known one, or all of them."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{match[0]}'?" if match else f"known: {', '.join(sorted(known))}"


def plugin_names(package: str) -> list[str]:
    """Names of the plug-ins of a package: its file names, with '-' for '_'. Imports none of them."""
    spec = importlib.util.find_spec(package)  # type: ignore[attr-defined]
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(spec.submodule_search_locations))


def plugin_module(package: str, name: str) -> Any:
    """Import the plug-in `name` of a package."""
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")


@dataclass(frozen=True)
class Plugin:
    """Marks a field that a plug-in's own `Config` class validates."""

    package: str
    """Where the plug-ins lie, a file each."""
    key: str
    """The entry of the value that names the plug-in."""
    word: bool = False
    """Whether the name alone may stand for the mapping."""

    def mapping(self, value: Any) -> Any:
        """The value with a bare name written out."""
        return {self.key: value} if self.word and isinstance(value, str) else value

    def config_class(self, value: Any) -> type[Config]:
        """The class that validates a value of the field; imports the plug-in."""
        names = plugin_names(self.package)
        value = self.mapping(value)
        if not isinstance(value, Mapping) or not isinstance(value.get(self.key), str):
            raise PydanticCustomError(
                "plugin",
                "needs an entry '{key}' that names one of: {known}",
                {"key": self.key, "known": ", ".join(names)},
            )
        name = value[self.key]
        if name not in names:
            raise PydanticCustomError(
                "plugin",
                "unknown {key} '{name}'; {hint}",
                {"key": self.key, "name": name, "hint": nearest(name, names)},
            )
        config: type[Config] = plugin_module(self.package, name).Config
        return config


def plugin_field(plugin: Plugin) -> Any:
    """Annotation of a field that a plug-in's own `Config` class validates.

    The value is a mapping whose entry `plugin.key` names the plug-in, the file of that name in `plugin.package`; the
    file is imported only when a recipe names it.
    """

    def load(value: Any) -> Any:
        if isinstance(value, Config):
            return value
        return plugin.config_class(value).model_validate(plugin.mapping(value))

    return (plugin, BeforeValidator(load), SerializeAsAny())  # type: ignore[type-arg]
