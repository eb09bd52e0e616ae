"""YAML 1.2 core schema, positions, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.errors import RecipeError
from vlmoe_core.recipe.tree import plain
from vlmoe_core.recipe.yaml12 import dump, parse


def read(text: str) -> object:
    tree = parse(text, "f.yaml")
    return None if tree is None else plain(tree)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            (word, word)
            for word in ("no", "on", "yes", "off", "y", "1:30", "2020-01-01", "1_000", "=", "0b1", "1e", ".")
        ],
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("12e03", 12000.0),
        ("+1", 1),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-.INF", float("-inf")),
        ("'1'", "1"),
        ('"true"', "true"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    result = read(f"key: {text}")
    assert result == {"key": value}
    assert type(result["key"]) is type(value)  # type: ignore[index]


def test_not_a_number_is_a_number() -> None:
    assert repr(read("key: .NaN")) == "{'key': nan}"


def test_every_value_knows_its_line() -> None:
    tree = parse("a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - {e: 4}\n", "f.yaml")
    assert tree is not None
    b = tree.child("b")
    assert b is not None and b.place == "f.yaml:2"
    d = b.child("d")
    assert d is not None and d.place == "f.yaml:4"
    assert [d.child(i).place for i in (0, 1)] == ["f.yaml:5", "f.yaml:6"]  # type: ignore[union-attr]
    assert d.child(2) is None and d.child("e") is None


def test_anchors_are_values() -> None:
    assert read("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: duplicate key 'a', first given on line 1; keep one of them"),
        ("a:\n  b: 1\n  'b': 2", "f.yaml:3: duplicate key 'b', first given on line 2; keep one of them"),
        ("a: 1\nb: !!str 3", "f.yaml:2: tags (tag:yaml.org,2002:str) are not allowed in a recipe"),
        (
            "a: !!python/object/apply:os.system [x]",
            "f.yaml:1: tags (tag:yaml.org,2002:python/object/apply:os.system) are not allowed",
        ),
        ("a: &x [*x]", "f.yaml:1: this anchor holds itself"),
        ("a: 1\n<<: {b: 1}", "f.yaml:2: merge keys (<<) are no part of YAML 1.2"),
        ("? [a]\n: 1", "f.yaml:1: a key must be a word, not a list or mapping"),
        ("a: 1\n\tb: 2", "f.yaml:2: not valid YAML: "),
        ("a:\n\t- 2", "indent with spaces, not with tabs"),
        ("a: [1", "f.yaml:1: not valid YAML: "),
        ("a: 1\n---\nb: 1", "f.yaml:2: not valid YAML: expected a single document"),
        ("a: *y", "f.yaml:1: not valid YAML: found undefined alias 'y'"),
        ("a: \x00", "f.yaml: not valid YAML: unacceptable character"),
        ("[" * 5000, "f.yaml: nested too deeply"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "f.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("aé☃ :#'\"\n-[]{}\\\t01.e~&*!|>%@`,", max_size=8)
)
tricky = st.sampled_from(
    [
        "no",
        "on",
        "1e-4",
        "0o17",
        "1:30",
        "2020-01-01",
        "~",
        "",
        "1_000",
        "=",
        "<<",
        "a: b",
        "# c",
        "a\nb",
        " x ",
        "010",
        ".5",
    ]
)
values = st.recursive(
    scalars | tricky, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(tricky, inner, max_size=4)
)


@given(st.dictionaries(tricky, values, max_size=4))
def test_what_is_written_reads_back(data: dict[str, object]) -> None:
    assert read(dump(data)) == data
