import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe_core.tasks.metrics.pairs import consistent, statement_of

DEV = Path(__file__).parents[3].parent / "shared" / "data" / "nlvr2" / "data" / "dev.json"
needs_shared = pytest.mark.skipif(not DEV.is_file(), reason="../shared is absent")


def consistency(ids, correct):
    """Share of the statements with all examples correct."""
    return consistent([statement_of(i) for i in ids], correct).mean()


def by_hand(judged):
    """Share of the statements of {(set, pair, sentence): correct} without a wrong example."""
    statements = {(group, sentence) for group, _, sentence in judged}
    good = [s for s in statements if all(right for (g, _, n), right in judged.items() if (g, n) == s)]
    return len(good) / len(statements)


keys = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))


@given(st.dictionaries(keys, st.booleans(), min_size=1))
def test_consistency_by_hand(judged):
    ids = [f"dev-{group}-{pair}-{sentence}" for group, pair, sentence in judged]
    assert consistency(ids, list(judged.values())) == pytest.approx(by_hand(judged))


def test_groups_leave_the_pair_out():
    assert statement_of("dev-850-3-1") == "dev-850-1"
    assert statement_of("dev-85-0-31") != statement_of("dev-853-0-1")
    assert consistency(["dev-1-0-0", "dev-1-1-0", "dev-1-0-1"], [True, False, True]) == 0.5
    assert list(consistent(["dev-1-1", "dev-1-0", "dev-1-0"], [True, True, False])) == [1, 0]


def test_nlvr_names_the_sentence_first():
    assert consistency(["1572-0", "1572-3", "16-0"], [True, True, False]) == 0.5


@pytest.mark.parametrize("identifier", ["dev-1-2", "dev-1-2-3-4", "dev", "", "dev--1-2"])
def test_other_identifiers_name_no_statement(identifier):
    assert statement_of(identifier) is None


@needs_shared
def test_published_development_set():
    records = [json.loads(line) for line in DEV.read_text("utf-8").splitlines()]
    ids = [record["identifier"] for record in records]
    says_true = [record["label"] == "True" for record in records]
    assert len(consistent([statement_of(i) for i in ids], says_true)) == 2018
    assert sum(says_true) == 3551
    judged = {tuple(map(int, i.split("-")[1:])): right for i, right in zip(ids, says_true, strict=True)}
    sentences = {}
    for (group, _, sentence), right in judged.items():
        sentences.setdefault((group, sentence), []).append(right)
    assert max(map(len, sentences.values())) == 4
    assert consistency(ids, says_true) == sum(map(all, sentences.values())) / 2018
    assert consistency(ids, [True] * len(ids)) == 1
    assert consistency(ids, [False] + [True] * (len(ids) - 1)) == pytest.approx(2017 / 2018)
