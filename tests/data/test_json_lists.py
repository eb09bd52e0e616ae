import json
import string

from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.data.json_lists import list_items

TEXT = st.text(st.sampled_from(string.ascii_letters + '"\\[]{}:, \n\u00e9\u0085\u20ac\U0001f600'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=4)


@given(
    before=st.dictionaries(TEXT, VALUES, max_size=3),
    items=OBJECTS,
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_the_bytes_of_each_object_are_found(tmp_path_factory, before, items, indent, ascii_only, mark):
    """Against the json package: whatever stands around and inside, the named bytes are the object."""
    before.pop("items", None)
    document = {**before, "items": items, "after": {"items": [1]}}
    path = tmp_path_factory.mktemp("lists") / "x.json"
    path.write_bytes(mark + json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode())
    data = path.read_bytes()
    found = list(list_items(path, "items", "x.json"))
    assert [json.loads(data[item.start : item.start + item.size]) for item in found] == items
    assert [item.number for item in found] == list(range(1, len(items) + 1))
