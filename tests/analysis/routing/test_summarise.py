"""Summaries equal what plain loops over plans and facts find; parts that are merged summarise as the whole does."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.model.support import config_of
from vlmoe_core.analysis.routing.summarise import Counted, merge, summarise
from vlmoe_core.analysis.routing.summary import CellSummary
from vlmoe_core.analysis.routing.tables import Cell, Sizes, Tables, count, empty_tables
from vlmoe_core.analysis.routing.tokens import KINDS, TokenFacts
from vlmoe_core.analysis.routing.trace import Trace
from vlmoe_core.moe.plan import RoutingPlan, make_plan

TEXT, VISION = Cell("vlm", 2, "text"), Cell("vlm", 2, "vision")
PLACES, WORDS, CLASSES, SEQUENCES = 9, 8, 3, 5
PIECES = ["[PAD]", "the", "red", "blue", "##s", ",", "circle", "dog"]


def plan_of(logits_TE: Tensor, top_k: int = 1, capacity: int | None = None) -> RoutingPlan:
    return make_plan(
        logits_TE, logits_TE, top_k=top_k, weights="gate", priority="gate", capacity=capacity, noise_std=0.0
    )


def random_plan(seed: int, experts: int, top_k: int, capacity: int | None, tokens: int = 200) -> RoutingPlan:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    logits_TE[:, -1] += 2  # an expert that most tokens want
    if experts > 3:
        logits_TE[:, 1] -= 30  # and one that none does
    return plan_of(logits_TE, top_k, capacity)


def random_facts(seed: int, modality: str, tokens: int = 200) -> TokenFacts:
    """Places end before the last that there are, and one in between has no token; so has one kind."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (tokens,), generator=generator)

    place_T = draw(0, PLACES - 2)
    return TokenFacts(
        kind_T=draw(0, len(KINDS[modality]) - 1),
        place_T=torch.where(place_T == 3, 4, place_T),
        sequence_T=draw(0, SEQUENCES),
        word_T=draw(-1, WORDS) if modality == "text" else torch.full((tokens,), -1),
        class_T=draw(-1, CLASSES),
        num_sequences=SEQUENCES + 1,
    )


def tables_of(cell: Cell, plan: RoutingPlan, facts: TokenFacts, classes: int = CLASSES) -> Tables:
    words = WORDS if cell.modality == "text" else 0
    sizes = Sizes(plan.num_experts, plan.top_k, PLACES, words, classes)
    tables = empty_tables(cell.modality, sizes, torch.device("cpu"))
    count(tables, plan, facts)
    return tables


def trace_of(cells: dict[Cell, Tables], flows: dict[Cell, Tensor] | None = None) -> Trace:
    pools = {cell: cell.modality for cell in cells}
    return Trace(config_of(), WORDS, tables=cells, flows=flows or {}, pools=pools)


def summary_of(cell: Cell, plan: RoutingPlan, facts: TokenFacts, pieces: Sequence[str] | None = PIECES) -> CellSummary:
    [found] = summarise(trace_of({cell: tables_of(cell, plan, facts)}), pieces, min_count=1)
    return found


def choices_of(plan: RoutingPlan) -> list[tuple[int, int, int, bool]]:
    """(token, rank, expert, kept)."""
    kept = plan.kept_TK.tolist()
    return [(t, k, e, kept[t][k]) for t, row in enumerate(plan.expert_TK.tolist()) for k, e in enumerate(row)]


def bits_of(labels: Sequence[object], experts: Sequence[int]) -> float:
    """Mutual information of two lists, by counting."""
    pairs, n = list(zip(labels, experts, strict=True)), len(labels)
    return sum(
        pairs.count((a, b)) / n * math.log2(pairs.count((a, b)) * n / (labels.count(a) * experts.count(b)))
        for a, b in set(pairs)
    )


CASES = pytest.mark.parametrize(
    ("cell", "experts", "top_k", "capacity"),
    [(TEXT, 5, 2, 60), (VISION, 5, 2, 60), (TEXT, 4, 1, None), (VISION, 2, 2, 90), (TEXT, 1, 1, 150)],
    ids=["text", "vision", "one choice, dropless", "k = E", "E = 1"],
)


@CASES
def test_loads_are_counts_of_choices(cell: Cell, experts: int, top_k: int, capacity: int | None) -> None:
    plan = random_plan(0, experts, top_k, capacity)
    found, choices = summary_of(cell, plan, random_facts(1, cell.modality)), choices_of(plan)
    wanted = [sum(e == expert for _, _, e, _ in choices) for expert in range(experts)]
    assert (found.task, found.layer, found.modality, found.pool) == (*cell, cell.modality)
    assert (found.num_experts, found.top_k, found.tokens) == (experts, top_k, 200)
    assert found.wanted == wanted
    assert found.got == [sum(e == expert and kept for _, _, e, kept in choices) for expert in range(experts)]
    assert found.first == [sum(e == expert and k == 0 for _, k, e, _ in choices) for expert in range(experts)]
    assert found.dead == [expert for expert in range(experts) if wanted[expert] == 0]
    assert found.overloaded == [e for e in range(experts) if wanted[e] > 2 * statistics.mean(wanted)]
    assert found.dropped == pytest.approx(sum(not kept for *_, kept in choices) / len(choices))
    assert found.gini == pytest.approx(sum(abs(a - b) for a in wanted for b in wanted) / (2 * experts * sum(wanted)))
    assert found.variation == pytest.approx(statistics.pstdev(wanted) / statistics.mean(wanted))


@CASES
def test_gates_have_mean_and_deviation(cell: Cell, experts: int, top_k: int, capacity: int | None) -> None:
    plan = random_plan(0, experts, top_k, capacity)
    found, gates = summary_of(cell, plan, random_facts(1, cell.modality)), plan.probs_TE.tolist()
    entropies = [-sum(g * math.log(g) for g in row if g > 0) for row in gates]
    assert found.gate == pytest.approx([statistics.mean(column) for column in zip(*gates, strict=True)])
    assert found.entropy == pytest.approx(statistics.mean(entropies))
    assert found.entropy_std == pytest.approx(statistics.pstdev(entropies), abs=1e-7)
    assert found.confidence == pytest.approx(statistics.mean(map(max, gates)))
    assert found.confidence_std == pytest.approx(statistics.pstdev(list(map(max, gates))), abs=1e-7)
    assert sum(found.entropy_histogram) == sum(found.confidence_histogram) == 200
    shares = [e / math.log(experts) if experts > 1 else 0.0 for e in entropies]
    assert found.entropy_histogram == [sum(min(19, int(s * 20)) == b for s in shares) for b in range(20)]


@CASES
def test_kinds_and_places_say_where_drops_fall(cell: Cell, experts: int, top_k: int, capacity: int | None) -> None:
    plan, facts = random_plan(0, experts, top_k, capacity), random_facts(1, cell.modality)
    found, choices = summary_of(cell, plan, facts), choices_of(plan)
    kinds = [KINDS[cell.modality][kind] for kind in facts.kind_T.tolist()]
    places = facts.place_T.tolist()
    assert list(found.kinds) == list(found.dropped_by_kind) == list(KINDS[cell.modality][:-1])
    for kind, first in found.kinds.items():
        assert first == [sum(k == 0 and kinds[t] == kind and e == x for t, k, e, _ in choices) for x in range(experts)]
        lost = [not kept for t, _, _, kept in choices if kinds[t] == kind]
        assert found.dropped_by_kind[kind] == pytest.approx(statistics.mean(lost))
    assert len(found.places) == len(found.dropped_by_place) == max(places) + 1 < PLACES
    for place, first in enumerate(found.places):
        assert first == [
            sum(k == 0 and places[t] == place and e == x for t, k, e, _ in choices) for x in range(experts)
        ]
        lost = [not kept for t, _, _, kept in choices if places[t] == place]
        share = found.dropped_by_place[place]
        assert share == pytest.approx(statistics.mean(lost)) if lost else share is None
    assert found.dropped_by_place[3] is None
    assert sum(found.dropped_share_histogram) == SEQUENCES
    if capacity is None:
        assert set(found.dropped_by_kind.values()) == {0}
        assert found.dropped_share_histogram[0] == SEQUENCES
    else:
        assert found.dropped > 0


@CASES
def test_choices_made_together(cell: Cell, experts: int, top_k: int, capacity: int | None) -> None:
    plan = random_plan(0, experts, top_k, capacity)
    found = summary_of(cell, plan, random_facts(1, cell.modality))
    if top_k == 1:
        assert found.together is None
    else:
        rows = plan.expert_TK.tolist()
        assert found.together == [
            [sum(a in row and b in row for row in rows) for b in range(experts)] for a in range(experts)
        ]


@CASES
def test_information_is_told_of_every_sort_of_label(cell: Cell, experts: int, top_k: int, capacity: int | None) -> None:
    plan, facts = random_plan(0, experts, top_k, capacity), random_facts(1, cell.modality)
    found, first = summary_of(cell, plan, facts), plan.expert_TK[:, 0].tolist()
    words, classes = facts.word_T.tolist(), facts.class_T.tolist()
    names = {-1: "", 0: "special", 1: "determiner", 4: "continuation", 5: "punctuation", 6: "shape", 7: "open"}
    labels = {
        "word": words,
        "word class": ["colour" if word in (2, 3) else names[word] for word in words],
        "place": facts.place_T.tolist(),
        "kind": facts.kind_T.tolist(),
        "class": classes,
    }
    known = {
        "word": [w >= 0 for w in words],
        "word class": [w >= 0 for w in words],
        "place": [True] * 200,
        "kind": [True] * 200,
        "class": [c >= 0 for c in classes],
    }
    told = list(labels) if cell.modality == "text" else ["place", "kind", "class"]
    assert list(found.information) == told
    for name in told:
        pairs = [(label, e) for label, e, yes in zip(labels[name], first, known[name], strict=True) if yes]
        seen, chosen = [label for label, _ in pairs], [e for _, e in pairs]
        information = found.information[name]
        assert information.bits == pytest.approx(bits_of(seen, chosen), abs=1e-9)
        assert information.labels == len(set(seen))
        shares = [seen.count(label) / len(seen) for label in set(seen)]
        assert information.label_bits == pytest.approx(-sum(p * math.log2(p) for p in shares))
        assert information.low <= information.excess <= information.high


def test_words_are_told_by_their_pieces_alone() -> None:
    plan, facts = random_plan(0, 3, 1, None), random_facts(1, "text")
    told, silent = summary_of(TEXT, plan, facts), summary_of(TEXT, plan, facts, pieces=None)
    assert len(told.words) == 3
    assert {word.word for liked in told.words for word in liked} <= set(PIECES)
    assert all(word.lift > 1 for liked in told.words for word in liked)
    assert silent.words == []
    assert list(silent.information) == ["word", "place", "kind", "class"]
    assert replace(silent, words=told.words, information=told.information) == told
    assert summary_of(VISION, plan, random_facts(1, "vision")).words == []


def test_the_number_and_the_rarity_of_words_are_limited() -> None:
    facts = replace(random_facts(1, "text"), word_T=torch.tensor([1] * 90 + [2] * 9 + [3] * 101))
    trace = trace_of({TEXT: tables_of(TEXT, random_plan(0, 3, 1, None), facts)})
    assert {w.word for liked in summarise(trace, PIECES)[0].words for w in liked} <= {"the", "blue"}
    assert all(len(liked) <= 1 for liked in summarise(trace, PIECES, top=1, min_count=1)[0].words)


def test_a_word_without_a_piece_is_refused() -> None:
    with pytest.raises(ValueError, match=r"word 7 was counted, but there are only 4 pieces"):
        summary_of(TEXT, random_plan(0, 3, 1, None), random_facts(1, "text"), pieces=PIECES[:4])


def test_a_planted_router_is_found() -> None:
    """expert = f(colour of the word): all that is known is the word's, and the word class sees most of it."""
    facts = random_facts(2, "text", tokens=600)
    wanted_T = torch.where(facts.word_T == 2, 1, torch.where(facts.word_T == 3, 2, 0))
    found = summary_of(TEXT, plan_of(5 * torch.eye(4, dtype=torch.float64)[wanted_T]), facts)
    words = [word for word in facts.word_T.tolist() if word >= 0]
    p = [words.count(2) / len(words), words.count(3) / len(words)]
    expected = -sum(q * math.log2(q) for q in [*p, 1 - sum(p)])
    assert found.information["word"].bits == pytest.approx(expected)
    assert found.information["word"].low > 0.8 * expected
    assert 0.5 < found.information["word class"].excess < expected
    assert found.information["place"].low < 0.02 > found.information["class"].low
    assert [[word.word for word in liked] for liked in found.words][1:] == [["red"], ["blue"], []]
    assert found.dead == [3]


def test_a_cell_without_a_token() -> None:
    empty = Sizes(3, 2, PLACES, WORDS, CLASSES)
    [found] = summarise(trace_of({TEXT: empty_tables("text", empty, torch.device("cpu"))}), PIECES)
    assert (found.tokens, found.wanted, found.dead, found.overloaded) == (0, [0, 0, 0], [0, 1, 2], [])
    assert (found.gini, found.variation, found.entropy, found.confidence, found.dropped) == (0, 0, 0, 0, 0)
    assert (found.kinds, found.places, found.dropped_by_place, found.information) == ({}, [], [], {})
    assert found.words == [[], [], []]


def test_flow_comes_from_the_sparse_layer_before_of_the_same_task_and_modality() -> None:
    plan = random_plan(0, 3, 1, None)
    cells = [
        Cell(task, layer, modality)
        for task, layer, modality in [
            ("vlm", 5, "text"),
            ("vlm", 1, "text"),
            ("vlm", 3, "text"),
            ("vlm", 4, "vision"),
            ("mlm", 2, "text"),
        ]
    ]
    tables = {cell: tables_of(cell, plan, random_facts(1, cell.modality)) for cell in cells}
    flows = {cells[0]: torch.ones(2, 3, dtype=torch.int64), cells[2]: torch.full((3, 3), 2)}
    found = summarise(trace_of(tables, flows))
    assert [(s.task, s.layer, s.modality) for s in found] == sorted(cells)
    before = {(s.task, s.layer): (s.flow_from, s.flow) for s in found}
    assert before["vlm", 5] == (3, [[1, 1, 1], [1, 1, 1]])
    assert before["vlm", 3] == (1, [[2, 2, 2]] * 3)
    assert before["vlm", 1] == before["vlm", 4] == before["mlm", 2] == (None, None)


def test_renumbered_experts_change_the_order_alone() -> None:
    plan, facts = random_plan(0, 5, 2, 60), random_facts(1, "text")
    order = torch.tensor([3, 0, 4, 2, 1])  # the new expert n is the old order[n]
    renumbered = replace(plan, expert_TK=order.argsort()[plan.expert_TK], probs_TE=plan.probs_TE[:, order])
    old, new = summary_of(TEXT, plan, facts), summary_of(TEXT, renumbered, facts)
    for name in ("wanted", "got", "first", "words"):
        assert getattr(new, name) == [getattr(old, name)[n] for n in order.tolist()]
    assert new.gate == pytest.approx([old.gate[n] for n in order.tolist()])
    assert [order[n] for n in new.dead] == old.dead
    for name in ("gini", "variation", "entropy", "confidence", "dropped"):
        assert getattr(new, name) == pytest.approx(getattr(old, name))
    assert (new.dropped_by_kind, new.dropped_by_place) == (old.dropped_by_kind, old.dropped_by_place)
    for name, information in new.information.items():
        assert information.bits == pytest.approx(old.information[name].bits)


def test_summaries_are_plain_values() -> None:
    found = summary_of(TEXT, random_plan(0, 5, 2, 60), random_facts(1, "text"))
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["wanted"] == found.wanted


def _counted(plans: Sequence[RoutingPlan], facts: Sequence[TokenFacts], cell: Cell) -> Counted:
    tables = empty_tables(cell.modality, Sizes(5, 2, PLACES, WORDS, CLASSES), torch.device("cpu"))
    for plan, fact in zip(plans, facts, strict=True):
        count(tables, plan, fact)
    flow = sum((plan.expert_TK[:, 0].bincount(minlength=5).expand(5, 5) for plan in plans), torch.zeros(5, 5).long())
    return {cell: tables}, {cell: flow}, {cell: "shared"}


def test_merged_parts_are_the_whole() -> None:
    plans, facts = [random_plan(n, 5, 2, 60) for n in range(4)], [random_facts(n, "text") for n in range(4)]
    bounds = [0, 1, 1, 4]  # the second process has a cell, but no token of it
    parts = [_counted(plans[a:b], facts[a:b], TEXT) for a, b in pairwise(bounds)]
    before = [{f.name: getattr(part[0][TEXT], f.name).clone() for f in fields(Tables)} for part in parts]
    whole = _counted(plans, facts, TEXT)
    tables, flows, pools = merge(parts)
    for field in fields(Tables):
        torch.testing.assert_close(
            getattr(tables[TEXT], field.name), getattr(whole[0][TEXT], field.name), rtol=1e-12, atol=0
        )
    assert flows[TEXT].tolist() == whole[1][TEXT].tolist()
    assert pools == {TEXT: "shared"}
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(getattr(part[0][TEXT], name), counts) for name, counts in old.items()), "changed a part"


def test_merge_keeps_cells_that_one_part_has_alone() -> None:
    plan = random_plan(0, 5, 2, None)
    mine, yours = (_counted([plan], [random_facts(1, "text")], cell) for cell in (TEXT, Cell("mlm", 0, "text")))
    tables, flows, pools = merge([mine, yours])
    assert list(tables) == list(flows) == list(pools) == [TEXT, Cell("mlm", 0, "text")]
    assert tables[TEXT].num_tokens == 200
    assert merge([]) == ({}, {}, {})
