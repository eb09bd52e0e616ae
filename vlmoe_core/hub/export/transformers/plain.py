"""Configs without pydantic, from values that were validated when the recipe was read.

In an exported repository this file stands in for vlmoe_core/config.py and for pydantic: config classes are copied as
they are, their fields become plain attributes, their validators rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from vlmoe_core.hub.export.transformers.plugins import plugin_module

Validator = TypeVar("Validator")


class Config:
    """Values by name; one that is not given has the default of its class.

    Raises ValueError for a name that the class does not know.
    """

    def __init__(self, **values: Any) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        if unknown := sorted(values.keys() - hints.keys()):
            raise ValueError(f"{type(self).__name__} knows no {', '.join(unknown)}: the config is of a newer version")
        for name, value in values.items():
            setattr(self, name, _built(value, hints[name]))

    @classmethod
    def model_validate(cls, values: Mapping[str, Any]) -> Self:
        """The config of a mapping."""
        return cls(**values)


def _built(value: Any, hint: Any) -> Any:
    """A mapping as the config or dict that the annotation of its field names, a list as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    config = _config_class(value, hint)
    return _with_keys(value, hint) if config is None else config(**value)


def _with_keys(value: Mapping[str, Any], hint: Any) -> dict[Any, Any]:
    """A mapping whose keys JSON made words, with numbers as keys where the annotation has a `dict[int, ...]`."""
    dicts = [one for one in (hint, *get_args(hint)) if get_origin(one) is dict]
    key = int if any(get_args(one)[0] is int for one in dicts) else str
    return {key(name): _built(one, None) for name, one in value.items()}


def _config_class(value: Mapping[str, Any], hint: Any) -> type[Config] | None:
    """The class in an annotation `X`, `X | None`, or `Annotated[X, plug-in]`."""
    plugin = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Plugin)), None)
    if plugin is not None:
        return plugin.config_class(value)
    classes = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and issubclass(one, Config)]
    return classes[0] if classes else None


@dataclass(frozen=True)
class Plugin:
    """Marks a field that a plug-in's own `Config` class holds."""

    package: str
    """Where the plug-ins lie, a file each."""
    key: str
    """The entry of the value that names the plug-in."""
    word: bool = False
    """Whether the name alone may stand for the mapping, in a recipe."""

    def config_class(self, value: Mapping[str, Any]) -> type[Config]:
        """The class of a value of the field."""
        config: type[Config] = plugin_module(self.package, value[self.key]).Config
        return config


def plugin_field(plugin: Plugin) -> tuple[Plugin]:
    """What annotates a field of a plug-in."""
    return (plugin,)


def Field(default: Any = None, *, default_factory: Callable[[], Any] | None = None, **limits: Any) -> Any:
    """The default of a field."""
    return default if default_factory is None else default_factory()


def model_validator(mode: str) -> Callable[[Validator], Validator]:
    """Leaves a validator as it is: nobody calls it."""
    return lambda validator: validator


class PydanticCustomError(ValueError):
    """Never raised: values were validated before."""


__all__ = ["Config", "Field", "Plugin", "PydanticCustomError", "model_validator", "plugin_field", "plugin_module"]
