"""Configs without pydantic hold what the validated ones hold."""

from typing import Any

import pytest

from tests.model.support import SHARED, SPARSE, config_of
from vlmoe_core.hub.export.transformers.plain import Config, Field, Plugin, model_validator, plugin_field
from vlmoe_core.model.config import ModelConfig


class Inner(Config):
    size: int = Field(3, ge=1)
    names: tuple[str, ...] = Field(default_factory=tuple)


class Outer(Config):
    inner: Inner | None = None
    always: Inner = Inner()
    layers: tuple[int, ...] | dict[str, int] = ()
    kept: dict[int, tuple[int, ...]] | None = None

    @model_validator(mode="after")
    def _never(self) -> Any:
        raise AssertionError("validators rest")


def test_mappings_become_configs_and_lists_tuples() -> None:
    outer = Outer.model_validate({"inner": {"size": 5, "names": ["a", "b"]}, "layers": {"every": 2}})
    assert outer.inner is not None
    assert (outer.inner.size, outer.inner.names) == (5, ("a", "b"))
    assert outer.layers == {"every": 2}
    assert (outer.always.size, outer.always.names) == (3, ())
    assert Outer(layers=[1, 2]).layers == (1, 2)
    assert Outer().inner is None
    assert Outer(kept={"3": [0, 2]}).kept == {3: (0, 2)}


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match="Inner knows no colour: the config is of a newer version"):
        Outer.model_validate({"inner": {"colour": 1}})


def test_a_plugin_chooses_the_class_of_its_field() -> None:
    plugin = Plugin("vlmoe_core.moe.routers", "name", word=True)
    assert plugin_field(plugin) == (plugin,)
    assert plugin.config_class({"name": "bias-balanced"}).__module__ == "vlmoe_core.moe.routers.bias_balanced"


@pytest.mark.parametrize("values", [{}, {"moe": SPARSE}, SHARED, {"patch_embed": "conv", "norm": "per_modality"}])
def test_all_values_of_a_model_are_resolved(values: dict[str, Any]) -> None:
    # An exported config holds every field, so that defaults may change in later versions.
    config = config_of(**values)
    assert config.model_dump(mode="json").keys() == ModelConfig.model_fields.keys()
