import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.tasks.metrics.labels import hits

examples = st.lists(st.tuples(st.permutations("abcd"), st.sampled_from("abcde")))


@given(examples, st.integers(1, 5))
def test_hits_by_counting(drawn, k):
    predictions, truth = [p for p, _ in drawn], [t for _, t in drawn]
    assert list(hits(predictions, truth, k)) == [float(any(p[i] == t for i in range(min(k, 4)))) for p, t in drawn]


def test_hits_by_hand():
    predictions = [("cat", "dog"), ("dog", "cat"), ()]
    assert list(hits(predictions, ["cat", "cat", "cat"])) == [1, 0, 0]
    assert list(hits(predictions, ["cat", "cat", "cat"], k=2)) == [1, 1, 0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="longer"):
        hits([("a",)], ["a", "b"])
