"""Tables equal a count token by token, add up, and take the same memory however many tokens they counted."""

import math
import tracemalloc
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.analysis.routing.support import KINDS, Expected, Token, assert_same, total_bytes
from vlmoe_core.analysis.routing.tables import BINS, Sizes, Tables, count, empty_tables
from vlmoe_core.analysis.routing.tokens import SHUFFLES, TokenFacts
from vlmoe_core.moe.peak import peak_bytes
from vlmoe_core.moe.plan import RoutingPlan, make_plan

CPU = torch.device("cpu")
PER_TOKEN = ("kind_T", "place_T", "sequence_T", "word_T", "class_T")
SIZES = Sizes(experts=4, top_k=2, places=6, words=9, classes=3)


def plan_of(logits_TE: torch.Tensor, top_k: int, capacity: int | None = None) -> RoutingPlan:
    return make_plan(
        logits_TE, logits_TE, top_k=top_k, weights="gate", priority="gate", capacity=capacity, noise_std=0.0
    )


def random_plan(tokens: int, sizes: Sizes, capacity: int | None, seed: int = 0) -> RoutingPlan:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(tokens, sizes.experts, generator=generator, dtype=torch.float64)
    return plan_of(logits_TE, sizes.top_k, capacity)


def random_facts(tokens: int, sizes: Sizes, modality: str, sequences: int = 5, seed: int = 0) -> TokenFacts:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (tokens,), generator=generator)

    return TokenFacts(
        kind_T=draw(0, len(KINDS[modality])),
        place_T=draw(0, sizes.places),
        sequence_T=draw(0, sequences),
        word_T=draw(-1, max(1, sizes.words)),
        class_T=draw(-1, max(1, sizes.classes)),
        num_sequences=sequences + 2,  # two sequences without a token of this modality
    )


def tokens_of(facts: TokenFacts, modality: str, sizes: Sizes) -> list[Token]:
    columns = (facts.kind_T, facts.place_T, facts.sequence_T, facts.word_T, facts.class_T)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Token(modality, KINDS[modality][kind], place, sequence, word if sizes.words else -1, label)
        for kind, place, sequence, word, label in rows
    ]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 30),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 3),
    capacity=st.none() | st.integers(1, 8),
    words=st.sampled_from([0, 7]),
    classes=st.sampled_from([0, 3]),
    modality=st.sampled_from(["vision", "text"]),
    seed=st.integers(0, 1000),
)
def test_counts_equal_a_count_token_by_token(
    tokens: int, experts: int, top_k: int, capacity: int | None, words: int, classes: int, modality: str, seed: int
) -> None:
    sizes = Sizes(experts, min(top_k, experts), places=6, words=words, classes=classes)
    tables = empty_tables(modality, sizes, CPU)
    expected = Expected.like(tables)
    for turn in range(2):
        plan = random_plan(tokens, sizes, capacity, seed + turn)
        facts = random_facts(tokens, sizes, modality, seed=seed + turn)
        count(tables, plan, facts)
        expected.add(tokens_of(facts, modality, sizes), range(tokens), plan)
    assert_same(tables, expected)
    assert tables.num_tokens == 2 * tokens


def test_all_tables_are_compared() -> None:
    """The shuffled classes have a test of their own."""
    assert {f.name for f in fields(Tables)} - {"shuffled_class_RCE"} == {f.name for f in fields(Expected)}


def test_shuffled_classes_keep_the_loads_and_the_examples_of_each_class() -> None:
    """Three examples of four tokens each: a shuffled table has whole examples under other classes."""
    sizes = replace(SIZES, classes=3)
    tables, plan = empty_tables("text", sizes, CPU), random_plan(12, sizes, capacity=None)
    order_RX = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(r)) for r in range(SHUFFLES)])
    shuffled_RT, class_T = order_RX.repeat_interleave(4, 1), torch.arange(3).repeat_interleave(4)
    facts = replace(random_facts(12, sizes, "text"), class_T=class_T, shuffled_class_RT=shuffled_RT)
    count(tables, plan, facts)
    first_XE = torch.stack([torch.bincount(own, minlength=sizes.experts) for own in plan.expert_TK[:, 0].split(4)])
    assert torch.equal(tables.class_CE, first_XE)
    for table_CE, order_X in zip(tables.shuffled_class_RCE, order_RX, strict=True):
        assert torch.equal(table_CE[order_X], first_XE)


def test_wanted_is_got_and_dropped() -> None:
    tables = empty_tables("text", SIZES, CPU)
    count(tables, random_plan(200, SIZES, capacity=30), random_facts(200, SIZES, "text"))
    dropped = tables.wanted_KE.sum() - tables.got_KE.sum()
    assert tables.wanted_KE.sum() == 400 and tables.got_KE.sum(0).tolist() == [30] * 4
    assert dropped == tables.dropped_P.sum() == tables.dropped_J.sum() > 0
    assert tables.together_EE.diagonal().tolist() == tables.wanted_KE.sum(0).tolist()
    for first_choices in (tables.place_PE, tables.kind_JE):
        assert first_choices.sum(0).tolist() == tables.wanted_KE[0].tolist()


def test_parts_add_up_to_the_whole() -> None:
    whole, left, right = (empty_tables("text", SIZES, CPU) for _ in range(3))
    plan, facts = random_plan(100, SIZES, capacity=20), random_facts(100, SIZES, "text", sequences=1)
    halves = [replace(facts, **{n: getattr(facts, n)[rows] for n in PER_TOKEN}) for rows in (slice(40), slice(40, 100))]
    count(left, plan.tokens(0, 40), halves[0])
    count(right, plan.tokens(40, 100), halves[1])
    count(whole, plan.tokens(0, 40), halves[0])
    count(whole, plan.tokens(40, 100), halves[1])
    for field in fields(Tables):
        total = getattr(left, field.name) + getattr(right, field.name)
        torch.testing.assert_close(total, getattr(whole, field.name), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("chosen", "experts", "entropy_bin"), [(1, 4, 0), (2, 4, 10), (4, 4, 19), (4, 16, 10)])
def test_gates_on_the_edge_of_a_bin_belong_to_the_bin_above(chosen: int, experts: int, entropy_bin: int) -> None:
    """Even gates of some experts: what the routers that learn nothing give."""
    sizes = replace(SIZES, experts=experts, top_k=1)
    logits_TE = torch.full((3, experts), -math.inf)
    logits_TE[:, :chosen] = 0
    tables = empty_tables("text", sizes, CPU)
    count(tables, plan_of(logits_TE, 1), random_facts(3, sizes, "text"))
    assert tables.entropy_B.nonzero().tolist() == [[entropy_bin]]
    assert tables.confidence_B.nonzero().tolist() == [[min(BINS - 1, BINS // chosen)]]
    assert tables.moments[0].item() == pytest.approx(3 * math.log(chosen))


def test_one_expert_has_no_entropy_and_all_confidence() -> None:
    sizes = replace(SIZES, experts=1, top_k=1)
    tables = empty_tables("vision", sizes, CPU)
    count(tables, random_plan(10, sizes, None), random_facts(10, sizes, "vision"))
    assert tables.entropy_B[0] == tables.confidence_B[-1] == 10
    assert tables.moments.tolist() == [0, 0, 10, 10]


def test_no_gradient_is_kept() -> None:
    logits_TE = torch.randn(20, SIZES.experts, requires_grad=True)
    tables = empty_tables("text", SIZES, CPU)
    count(tables, plan_of(logits_TE, SIZES.top_k), random_facts(20, SIZES, "text"))
    assert not any(getattr(tables, f.name).requires_grad for f in fields(Tables))


def test_sums_are_float64_where_the_device_has_it() -> None:
    for name, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)):
        with FakeTensorMode():
            tables = empty_tables("text", SIZES, torch.device(name))
        assert tables.gate_E.dtype == tables.moments.dtype == dtype


def feed(tokens: int, batch: int) -> tuple[Tables, int]:
    """The tables after so many tokens in batches, and the most bytes of tensors alive on the way."""
    tables = empty_tables("text", SIZES, CPU)
    plan, facts = random_plan(batch, SIZES, capacity=batch // 4), random_facts(batch, SIZES, "text")

    def work() -> None:
        for _ in range(tokens // batch):
            count(tables, plan, facts)

    return tables, peak_bytes(work, list)


def test_memory_does_not_grow_with_tokens() -> None:
    feed(20_000, 20_000)  # what a first call allocates for good
    (few, few_peak), (many, many_peak) = feed(100_000, 20_000), feed(1_000_000, 20_000)
    assert (few.num_tokens, many.num_tokens) == (100_000, 1_000_000)
    assert total_bytes(list(vars(few).values())) == total_bytes(list(vars(many).values()))
    assert 0 < many_peak <= 1.1 * few_peak


def test_python_keeps_nothing_of_the_tokens() -> None:
    tables = empty_tables("text", SIZES, CPU)
    plan, facts = random_plan(1000, SIZES, None), random_facts(1000, SIZES, "text")
    count(tables, plan, facts)
    tracemalloc.start()
    try:
        peaks = []
        for turns in (100, 1000):  # 1e5 and 1e6 tokens
            tracemalloc.reset_peak()
            for _ in range(turns):
                count(tables, plan, facts)
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0]
