import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from vlmoe_core.data.part import WHOLE, Part, part_of


def test_shares_count_as_written():
    """0.7 of 10 in binary fractions is 6.99...: the part would end one thing too early."""
    assert [part_of(10, part) for part in ((0, 0.7), (0.7, 1))] == [slice(0, 7), slice(7, 10)]
    assert part_of(4, WHOLE) == slice(0, 4)


@given(count=st.integers(0, 10**7), cut=st.integers(1, 999))
def test_parts_share_nothing_and_leave_nothing_out(count, cut):
    low, high = part_of(count, (0.0, cut / 1000)), part_of(count, (cut / 1000, 1.0))
    assert (low.start, low.stop, high.stop) == (0, count * cut // 1000, count) and high.start == low.stop


@pytest.mark.parametrize("part", [(0.5, 0.5), (-0.1, 1), (0, 1.1), (0.9, 0.1)])
def test_what_is_no_range_is_refused(part):
    with pytest.raises(ValidationError, match="part must be two numbers"):
        TypeAdapter(Part).validate_python(part)
