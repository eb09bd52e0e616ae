import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.errors import DataError
from vlmoe_core.tasks.metrics.labels import accuracy, hits, mean_by

examples = st.lists(st.tuples(st.permutations("abcd"), st.sampled_from("abcde"), st.sampled_from("xyz")), min_size=1)


@given(examples, st.integers(1, 5))
def test_accuracy_by_counting(drawn, k):
    predictions, truth = [p for p, _, _ in drawn], [t for _, t, _ in drawn]
    right = sum(any(p[i] == t for i in range(min(k, 4))) for p, t, _ in drawn)
    assert accuracy(predictions, truth, k) == pytest.approx(right / len(drawn))


@given(examples)
def test_mean_by_subset_by_counting(drawn):
    right = [float(p[0] == t) for p, t, _ in drawn]
    subsets = [s for _, _, s in drawn]
    expected = {}
    for subset in sorted(set(subsets)):
        own = [value for value, name in zip(right, subsets, strict=True) if name == subset]
        expected[subset] = pytest.approx(sum(own) / len(own))
    found = mean_by(right, subsets)
    assert found == expected
    assert list(found) == list(expected)


def test_hits_by_hand():
    predictions = [("cat", "dog"), ("dog", "cat"), ()]
    assert list(hits(predictions, ["cat", "cat", "cat"])) == [1, 0, 0]
    assert list(hits(predictions, ["cat", "cat", "cat"], k=2)) == [1, 1, 0]
    assert mean_by([0.3, 1, 0.6], ["other", "yes/no", "other"]) == {"other": pytest.approx(0.45), "yes/no": 1}
    assert mean_by([], []) == {}


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="at least one"):
        accuracy([], [])
    with pytest.raises(DataError, match="2 values but 1 names"):
        mean_by([1, 0], ["a"])
    with pytest.raises(ValueError, match="longer"):
        accuracy([("a",)], ["a", "b"])
