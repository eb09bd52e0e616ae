"""Messages of validation, on a small config with a plug-in of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from vlmoe_core.config import Config, Plugin, plugin_field
from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.mistakes import validated
from vlmoe_core.recipe.overrides import apply_overrides
from vlmoe_core.recipe.yaml12 import parse

PLUGIN = """
from vlmoe_core.config import Config as Base


class Inner(Base):
    colour: str = "red"


class Config(Base):
    kind: str
    count: int = 1
    inner: Inner = Inner()
"""


class Part(Config):
    heads: int = Field(1, ge=1)
    dim: int = Field(8, ge=1)
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    name: str = ""
    span: tuple[float, float] = (0.0, 1.0)
    where: tuple[int, ...] | dict[Literal["every"], int] = ()
    workers: int | Literal["auto"] = "auto"
    rate: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        return self


class Root(Config):
    part: Part = Part()
    parts: dict[str, Part] = Field(default_factory=dict)
    maybe: Part | None = None
    plug: Annotated[Config, *plugin_field(Plugin("toy_plugins", "kind"))] | None = None
    plugs: tuple[Annotated[Config, *plugin_field(Plugin("toy_plugins", "kind"))], ...] = ()
    word: Annotated[Config, *plugin_field(Plugin("toy_plugins", "kind", word=True))] | None = None
    needed: int

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.needed > self.part.dim:
            raise ValueError(f"needed ({self.needed}) is more than part.dim ({self.part.dim})")
        return self


@pytest.fixture(autouse=True)
def toy_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "toy_plugins"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "big_box.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("toy_plugins")]:
        del sys.modules[name]


def lines(text: str, *overrides: str) -> list[str]:
    root = parse(text, "f.yaml")
    assert root is not None
    with pytest.raises(RecipeError) as caught:
        validated(Root, apply_overrides(root, overrides), "f.yaml")
    return str(caught.value).splitlines()


def one(text: str, *overrides: str) -> str:
    found = lines(f"needed: 1\n{text}", *overrides)
    assert len(found) == 1, found
    return found[0]


def test_a_good_one_is_built() -> None:
    root = parse("needed: 1\nplug: {kind: big-box, inner: {colour: blue}}\npart: {where: {every: 2}}", "f.yaml")
    assert root is not None
    built = validated(Root, root, "f.yaml")
    assert built.plug is not None and built.plug.model_dump() == {
        "kind": "big-box",
        "count": 1,
        "inner": {"colour": "blue"},
    }
    assert built.part.where == {"every": 2}


def test_a_word_may_stand_for_a_mapping_where_the_field_says_so() -> None:
    built = []
    for text in ("word: big-box", "word: {kind: big-box}"):
        root = parse(f"needed: 1\n{text}", "f.yaml")
        assert root is not None
        built.append(validated(Root, root, "f.yaml").word)
    assert built[0] is not None and built[0] == built[1]
    assert built[0].model_dump() == {"kind": "big-box", "count": 1, "inner": {"colour": "red"}}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prat: 1", "f.yaml:2: prat: unknown key; did you mean 'part'?"),
        ("part:\n  hedas: 1", "f.yaml:3: part.hedas: unknown key; did you mean 'heads'?"),
        ("maybe:\n  hedas: 1", "f.yaml:3: maybe.hedas: unknown key; did you mean 'heads'?"),
        ("parts:\n  a:\n    hedas: 1", "f.yaml:4: parts.a.hedas: unknown key; did you mean 'heads'?"),
        (
            "part: {zzz: {heads: 1}}",
            "f.yaml:2: part.zzz: unknown key; known: dim, flag, heads, mode, name, rate, span, where, workers",
        ),
        ("part: {heads: many}", "f.yaml:2: part.heads: must be a whole number, not 'many'"),
        ("part: {heads: 1.5}", "f.yaml:2: part.heads: must be a whole number, not 1.5"),
        ("part: {heads: }", "f.yaml:2: part.heads: must be a whole number, not null"),
        ("part: {heads: [1]}", "f.yaml:2: part.heads: must be a whole number, not a list"),
        ("part: {heads: -2}", "f.yaml:2: part.heads: must be greater than or equal to 1, not -2"),
        ("part: {rate: x}", "f.yaml:2: part.rate: must be a number, not 'x'"),
        ("part: {rate: 0}", "f.yaml:2: part.rate: must be greater than 0, not 0"),
        ("part: {rate: .inf}", "f.yaml:2: part.rate: must be a finite number, not inf"),
        ("part: {mode: fats}", "f.yaml:2: part.mode: must be 'fast' or 'slow', not 'fats'"),
        ("part: {flag: 3}", "f.yaml:2: part.flag: must be true or false, not 3"),
        ("part: {name: true}", "f.yaml:2: part.name: must be a word or text, not true"),
        ("part: {span: [1]}", "f.yaml:2: part.span.1: missing; give it a value"),
        ("part: {span: [1, 2, 3]}", "f.yaml:2: part.span: must have at most 2 entries, not 3"),
        ("part: {span: {a: 1}}", "f.yaml:2: part.span: must be a list, not a mapping"),
        ("part: 3", "f.yaml:2: part: must be a mapping of keys, not 3"),
        ("part: {workers: x}", "f.yaml:2: part.workers: must be a whole number or 'auto', not 'x'"),
        ("part: {where: x}", "f.yaml:2: part.where: must be a list or a mapping of keys, not 'x'"),
        ("part: {where: [1, x]}", "f.yaml:2: part.where.1: must be a whole number, not 'x'"),
        ("part: {where: {evry: 2}}", "f.yaml:2: part.where.evry: unknown key; known: 'every'"),
        ("part:\n  dim: 8\n  heads: 3", "f.yaml:4: part: heads (3) must divide dim (8)"),
        ("part:\n  heads: 16", "f.yaml:3: part: heads (16) must divide dim (8)"),
        ("plug: {}", "f.yaml:2: plug: needs an entry 'kind' that names one of: big-box"),
        ("plug: {kind: big-bix}", "f.yaml:2: plug: unknown kind 'big-bix'; did you mean 'big-box'?"),
        ("plug:\n  kind: big-box\n  cuont: 1", "f.yaml:4: plug.cuont: unknown key; did you mean 'count'?"),
        (
            "plugs:\n  - kind: big-box\n  - kind: big-box\n    count: x",
            "f.yaml:5: plugs.1.count: must be a whole number, not 'x'",
        ),
        (
            "plugs:\n  - kind: big-box\n    inner:\n      color: x",
            "f.yaml:5: plugs.0.inner.color: unknown key; did you mean 'colour'?",
        ),
        ("plugs: {kind: big-box}", "f.yaml:2: plugs: must be a list, not a mapping"),
        ("plug: big-box", "f.yaml:2: plug: needs an entry 'kind' that names one of: big-box"),
        ("word: big-bix", "f.yaml:2: word: unknown kind 'big-bix'; did you mean 'big-box'?"),
        ("word: {kind: big-bix}", "f.yaml:2: word: unknown kind 'big-bix'; did you mean 'big-box'?"),
        ("word: {kind: big-box, cuont: 1}", "f.yaml:2: word.cuont: unknown key; did you mean 'count'?"),
        ("word: 3", "f.yaml:2: word: needs an entry 'kind' that names one of: big-box"),
    ],
)
def test_one_mistake_is_one_line(text: str, line: str) -> None:
    assert one(text) == line


def test_a_long_value_is_cut() -> None:
    assert len(one(f"part: {{heads: {'x' * 500}}}")) < 130


def test_several_mistakes_are_a_line_each() -> None:
    assert lines("part: {heads: x}\nextra: 1") == [
        "f.yaml:1: part.heads: must be a whole number, not 'x'",
        "f.yaml: needed: missing; give it a value",
        "f.yaml:2: extra: unknown key; known: maybe, needed, part, parts, plug, plugs, word",
    ]


def test_an_override_is_named_instead_of_a_line() -> None:
    assert one("part: {dim: 8}", "part.heads=x") == "--set part.heads=x: part.heads: must be a whole number, not 'x'"
    assert one("part: {dim: 8}", "prat.dim=8") == "--set prat.dim=8: prat: unknown key; did you mean 'part'?"
    assert (
        one("plugs: [{kind: big-box}]", "plugs.0.count=x")
        == "--set plugs.0.count=x: plugs.0.count: must be a whole number, not 'x'"
    )


def test_of_keys_that_do_not_fit_each_other_the_overridden_one_is_named() -> None:
    assert one("part: {heads: 4, dim: 8}", "part.dim=6") == "--set part.dim=6: part: heads (4) must divide dim (6)"
    assert one("part: {dim: 8}", "needed=9") == "--set needed=9: needed (9) is more than part.dim (8)"
    assert lines("part:\n  dim: 8\nneeded: 9") == ["f.yaml:3: needed (9) is more than part.dim (8)"]
