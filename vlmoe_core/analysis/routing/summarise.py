"""From the counts of several processes to one, and from the counts to what a trace found.

Axis letters: E experts, P places, J kinds of tokens, K choices of a token, L labels, V words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from typing import Any

import numpy as np
from torch import Tensor

from vlmoe_core.analysis.routing.measures import Counts, gini, information, information_over, liked_words, variation
from vlmoe_core.analysis.routing.summary import CellSummary, Information, LikedWord
from vlmoe_core.analysis.routing.tables import Cell, Tables
from vlmoe_core.analysis.routing.tokens import KINDS
from vlmoe_core.analysis.routing.trace import Trace
from vlmoe_core.analysis.routing.words import word_class

Counted = tuple[dict[Cell, Tables], dict[Cell, Tensor], dict[Cell, str]]
"""The `tables`, `flows` and `pools` of a trace."""


@dataclass(frozen=True)
class Naming:
    """What words are called, and which of them are told."""

    pieces: Sequence[str]
    """The text of each token id."""
    top: int
    """At most so many words for each expert."""
    min_count: int
    """Words that a cell has less often are not among them."""


def counted(trace: Trace) -> Counted:
    """What a trace counted, on the CPU: to be sent to another process."""
    tables = {
        cell: Tables(**{field.name: getattr(own, field.name).cpu() for field in fields(Tables)})
        for cell, own in trace.tables.items()
    }
    return tables, {cell: flow_FE.cpu() for cell, flow_FE in trace.flows.items()}, trace.pools


def merge(parts: Sequence[Counted]) -> Counted:
    """The counts of several processes as one: those of equal cells are added, in the order of the parts."""
    tables: dict[Cell, Tables] = {}
    flows: dict[Cell, Tensor] = {}
    pools: dict[Cell, str] = {}
    for part_tables, part_flows, part_pools in parts:
        for cell, more in part_tables.items():
            tables[cell] = _added(tables[cell], more) if cell in tables else more
        for cell, flow_FE in part_flows.items():
            flows[cell] = flows[cell] + flow_FE if cell in flows else flow_FE
        pools |= part_pools
    return tables, flows, pools


def _added(a: Tables, b: Tables) -> Tables:
    return replace(a, **{field.name: getattr(a, field.name) + getattr(b, field.name) for field in fields(Tables)})


def summarise(
    trace: Trace, pieces: Sequence[str] | None = None, *, top: int = 20, min_count: int = 10, seed: int = 0
) -> list[CellSummary]:
    """What was counted in each cell, by task, layer and modality.

    Args:
        trace: the counts.
        pieces: the text of each token id; null: neither words nor their classes are told.
        top: at most so many words for each expert.
        min_count: words that a cell has less often are not among them.
        seed: of the shuffled tables that mutual information is compared with.

    Raises:
        ValueError: a word was counted that has no piece.
    """
    naming = None if pieces is None else Naming(pieces, top, min_count)
    return [_summary(trace, cell, naming, seed) for cell in sorted(trace.tables)]


def _summary(trace: Trace, cell: Cell, naming: Naming | None, seed: int) -> CellSummary:
    tables = trace.tables[cell]
    before = _layer_before(trace, cell)
    labelled = _labelled(cell, tables, naming)
    return CellSummary(
        task=cell.task,
        layer=cell.layer,
        modality=cell.modality,
        pool=trace.pools[cell],
        flow_from=before,
        flow=None if before is None else trace.flows[cell].tolist(),
        information={name: information(table_LE, seed=seed) for name, table_LE in labelled if table_LE.any()}
        | _of_classes(tables),
        words=_words(tables, naming),
        **_loads(tables),
        **_gates(tables),
        **_kinds(cell, tables),
        **_places(tables),
    )


def _layer_before(trace: Trace, cell: Cell) -> int | None:
    """The sparse layer before, of the same task and modality."""
    alike = [other.layer for other in trace.tables if other._replace(layer=cell.layer) == cell]
    return max((layer for layer in alike if layer < cell.layer), default=None)


def _array(counts: Tensor) -> Counts:
    found: Counts = counts.cpu().numpy()
    return found


def _loads(tables: Tables) -> dict[str, Any]:
    top_k, experts = tables.wanted_KE.shape
    wanted_E = _array(tables.wanted_KE.sum(0))
    return {
        "num_experts": experts,
        "top_k": top_k,
        "tokens": tables.num_tokens,
        "wanted": wanted_E.tolist(),
        "got": tables.got_KE.sum(0).tolist(),
        "first": tables.wanted_KE[0].tolist(),
        "dead": np.flatnonzero(wanted_E == 0).tolist(),
        "overloaded": np.flatnonzero(wanted_E * experts > 2 * wanted_E.sum()).tolist(),
        "gini": gini(wanted_E),
        "variation": variation(wanted_E),
        "together": tables.together_EE.tolist() if top_k > 1 else None,
        "dropped_share_histogram": tables.dropped_share_B.tolist(),
    }


def _gates(tables: Tables) -> dict[str, Any]:
    tokens = max(tables.num_tokens, 1)
    entropy, entropy_square, confidence, confidence_square = (tables.moments / tokens).tolist()
    return {
        "gate": (tables.gate_E / tokens).tolist(),
        "entropy": entropy,
        "entropy_std": sqrt(max(0.0, entropy_square - entropy**2)),
        "confidence": confidence,
        "confidence_std": sqrt(max(0.0, confidence_square - confidence**2)),
        "entropy_histogram": tables.entropy_B.tolist(),
        "confidence_histogram": tables.confidence_B.tolist(),
    }


def _kinds(cell: Cell, tables: Tables) -> dict[str, Any]:
    """Of the kinds that occurred."""
    first = dict(zip(KINDS[cell.modality], tables.kind_JE.tolist(), strict=True))
    dropped = dict(zip(KINDS[cell.modality], _dropped_shares(tables.kind_JE, tables.dropped_J, tables), strict=True))
    return {
        "kinds": {kind: first_E for kind, first_E in first.items() if sum(first_E)},
        "dropped_by_kind": {kind: share for kind, share in dropped.items() if share is not None},
    }


def _places(tables: Tables) -> dict[str, Any]:
    """Up to the last place that a token had."""
    used_P = np.flatnonzero(_array(tables.place_PE).any(1))
    end = int(used_P[-1]) + 1 if len(used_P) else 0
    return {
        "places": tables.place_PE[:end].tolist(),
        "dropped_by_place": _dropped_shares(tables.place_PE[:end], tables.dropped_P[:end], tables),
    }


def _dropped_shares(first_LE: Tensor, dropped_L: Tensor, tables: Tables) -> list[float | None]:
    """Dropped choices over all choices of each label's tokens; null where it has none."""
    choices_L = first_LE.sum(1) * tables.wanted_KE.shape[0]
    pairs = zip(dropped_L.tolist(), choices_L.tolist(), strict=True)
    return [dropped / choices if choices else None for dropped, choices in pairs]


def _labelled(cell: Cell, tables: Tables, naming: Naming | None) -> Iterator[tuple[str, Counts]]:
    """What an expert may tell of a token, with first choices by its labels (L, E)."""
    word_VE = _array(tables.word_VE)
    yield "word", word_VE
    if naming is not None:
        yield "word class", _by_class(word_VE, naming.pieces)
    yield "place", _array(tables.place_PE)
    yield "kind", _array(tables.kind_JE)


def _of_classes(tables: Tables) -> dict[str, Information]:
    """What the expert tells of the class, which all tokens of an example share: shuffled by examples."""
    class_CE = _array(tables.class_CE)
    return {"class": information_over(class_CE, _array(tables.shuffled_class_RCE))} if class_CE.any() else {}


def _by_class(word_VE: Counts, pieces: Sequence[str]) -> Counts:
    """(L, E) first choices by class of word."""
    seen: list[int] = np.flatnonzero(word_VE.any(1)).tolist()
    if seen and seen[-1] >= len(pieces):
        raise ValueError(f"word {seen[-1]} was counted, but there are only {len(pieces)} pieces; give the tokenizer's")
    classes = [word_class(pieces[word]) for word in seen]
    names = sorted(set(classes))
    found_LE = np.zeros((len(names), word_VE.shape[1]), np.int64)
    np.add.at(found_LE, np.array([names.index(name) for name in classes], np.int64), word_VE[seen])
    return found_LE


def _words(tables: Tables, naming: Naming | None) -> list[list[LikedWord]]:
    word_VE = _array(tables.word_VE)
    if naming is None or not len(word_VE):
        return []
    return liked_words(word_VE, naming.pieces, naming.top, naming.min_count)
