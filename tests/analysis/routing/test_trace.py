"""A trace counts what hooks on the routers themselves count, token by token, and leaves nothing behind."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from tests.analysis.codes.support import random_tokenizer
from tests.analysis.routing.support import (
    CLASSES,
    SPECIAL,
    Expected,
    Heard,
    Token,
    assert_same,
    batch_of,
    make_samples,
    routers_heard,
    sparse_encoder,
    tokens_of,
    total_bytes,
)
from tests.model.support import VOCAB
from vlmoe_core.analysis.routing.api import trace
from vlmoe_core.analysis.routing.tables import Cell, Tables
from vlmoe_core.analysis.routing.trace import Trace, encoder_of
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe.peak import peak_bytes
from vlmoe_core.tokenizers.online import OnlineTokenizer

TASKS: dict[StreamName, str] = {"image": "mim", "text": "mlm", "pair": "vlm"}


def per_modality(top_k: int = 1, factor: float | None = None) -> dict[str, Any]:
    """Experts of each modality in several layers, the same capacity in training and evaluation."""
    shared = {"top_k": top_k, "capacity_factor": factor, "eval_capacity_factor": factor}
    return {
        "layers": 4,
        "moe": {
            "vision": {"num_experts": 4, "layers": [0, 2, 3], **shared},
            "text": {"num_experts": 3, "layers": [0, 1, 2], **shared},
        },
    }


def one_pool(top_k: int = 1, factor: float | None = None) -> dict[str, Any]:
    """One pool for both modalities."""
    capacity = {"top_k": top_k, "capacity_factor": factor, "eval_capacity_factor": factor}
    return {"expert_pool": "shared", "moe": {"shared": {"num_experts": 4, "layers": [0, 1], **capacity}}}


def three_streams(config: ModelConfig, seed: int = 0) -> list[tuple[StreamName, list[Sample]]]:
    """Two micro-batches of each stream, of different sizes."""
    lengths = [[7, 12, 4], [9, 5, 8, 24, 6]]
    return [
        (stream, make_samples(stream, some, config, seed + number))
        for number, some in enumerate(lengths)
        for stream in STREAMS
    ]


class Hooked:
    """The tables and flows of a trace, from what hooks on the routers heard."""

    def __init__(self, tables: Mapping[Cell, Tables]) -> None:
        self.tables = {cell: Expected.like(one) for cell, one in tables.items()}
        self.flows: dict[Cell, Counter[tuple[int, int]]] = {}
        self.pools: dict[Cell, str] = {}
        self.tokens: Counter[Cell] = Counter()

    def add(self, task: str, samples: Sequence[Sample], heard: Sequence[Heard]) -> None:
        """One forward pass."""
        tokens = tokens_of(samples)
        before: dict[str, list[int]] = {}
        for one in heard:
            for modality in ("vision", "text"):
                fed = tokens if one.pool == "shared" else [t for t in tokens if t.modality == one.pool]
                rows = [row for row, token in enumerate(fed) if token.modality == modality]
                assert one.plan.expert_TK.shape[0] == len(fed)
                if rows:
                    cell = Cell(task, one.layer, modality)
                    first = [int(one.plan.expert_TK[row, 0]) for row in rows]
                    self._add_cell(cell, [fed[row] for row in rows], rows, one)
                    if modality in before:
                        pairs = zip(before[modality], first, strict=True)
                        self.flows.setdefault(cell, Counter()).update(pairs)
                    before[modality] = first

    def _add_cell(self, cell: Cell, tokens: Sequence[Token], rows: Sequence[int], heard: Heard) -> None:
        self.tables[cell].add(tokens, rows, heard.plan)
        self.pools[cell] = heard.pool
        self.tokens[cell] += len(rows)


def assert_equals_hooks(found: Trace, hooked: Hooked) -> None:
    assert found.tables.keys() == hooked.tokens.keys() and found.pools == hooked.pools
    assert found.flows.keys() == hooked.flows.keys()
    for cell, tables in found.tables.items():
        assert_same(tables, hooked.tables[cell])
        assert tables.num_tokens == hooked.tokens[cell]
        dropped = tables.wanted_KE.sum() - tables.got_KE.sum()
        assert dropped == tables.dropped_P.sum() == tables.dropped_J.sum()
    for cell, flow_FE in found.flows.items():
        counted = {(f, e): int(n) for f, row in enumerate(flow_FE.tolist()) for e, n in enumerate(row) if n}
        assert counted == dict(hooked.flows[cell])


def traced(encoder: Encoder, micros: Sequence[tuple[StreamName, list[Sample]]]) -> tuple[Trace, Hooked]:
    """A trace of the forward (in training also backward) passes, and what the hooks heard of the same ones."""
    heard = []
    with trace(encoder, TASKS, SPECIAL, CLASSES) as found:
        for stream, samples in micros:
            with routers_heard(encoder) as plans:
                encoded = encoder(batch_of(stream, samples, encoder.config))
            heard.append((TASKS[stream], samples, plans))
            if encoder.training:
                encoded.states_TD.square().sum().backward()
    hooked = Hooked(found.tables)
    for task, samples, plans in heard:
        hooked.add(task, samples, plans)
    return found, hooked


@pytest.mark.parametrize("factor", [None, 0.6])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("pools", [per_modality, one_pool])
def test_counts_equal_those_of_hooks_on_the_routers(pools: Any, top_k: int, factor: float | None) -> None:
    encoder = sparse_encoder(**pools(top_k, factor))
    found, hooked = traced(encoder, three_streams(encoder.config))
    assert_equals_hooks(found, hooked)
    drops = sum(int(one.dropped_P.sum()) for one in found.tables.values())
    assert drops == 0 if factor is None else drops > 0


@pytest.mark.parametrize("pools", [per_modality, one_pool])
def test_cells_and_flows_are_those_of_the_sparse_layers_that_ran(pools: Any) -> None:
    encoder = sparse_encoder(**pools())
    found, _ = traced(encoder, three_streams(encoder.config))
    # The top block's VL-FFN is dense: pairs meet the pools below it.
    layers = {"vision": [0, 2, 3], "text": [0, 1, 2]} if pools is per_modality else {"vision": [0, 1], "text": [0, 1]}
    wanted = {Cell("mim", i, "vision") for i in layers["vision"]} | {Cell("mlm", i, "text") for i in layers["text"]}
    wanted |= {Cell("vlm", i, name) for name, some in layers.items() for i in some if i < encoder.config.layers - 1}
    assert set(found.tables) == wanted
    assert set(found.flows) == {cell for cell in wanted if cell.layer > 0}


@pytest.mark.parametrize("recompute", [False, True])
def test_each_forward_pass_is_counted_once_in_training_too(recompute: bool) -> None:
    """With noise, and with recomputed activations, whose routers run again in the backward pass."""
    encoder = sparse_encoder(recompute=recompute, **per_modality(2, 0.6)).train()
    with routers_heard(encoder) as calls:
        found, hooked = traced(encoder, three_streams(encoder.config))
    assert_equals_hooks(found, hooked)
    forwards = 2 * (3 + 3 + 5)
    assert len(calls) == (2 * forwards if recompute else forwards)


def test_several_pictures_of_one_example_are_sequences_of_its_class() -> None:
    encoder = sparse_encoder(**per_modality(1, 0.6))
    samples = make_samples("pair", [7, 12, 9], encoder.config, pictures=2)
    found, hooked = traced(encoder, [("pair", samples)])
    assert_equals_hooks(found, hooked)
    assert found.tables[Cell("vlm", 0, "vision")].dropped_share_B.sum() == 6
    assert found.tables[Cell("vlm", 0, "vision")].class_CE.sum(1).tolist() == [34, 34, 34]


def test_halves_of_the_data_add_up_to_the_whole() -> None:
    encoder = sparse_encoder(**per_modality(2, 0.6))
    micros = three_streams(encoder.config) + three_streams(encoder.config, seed=7)
    whole, left, right = (traced(encoder, some)[0] for some in (micros, micros[:6], micros[6:]))
    assert whole.tables.keys() == left.tables.keys() == right.tables.keys()
    for cell, tables in whole.tables.items():
        for field in fields(Tables):
            parts = [getattr(part.tables[cell], field.name) for part in (left, right)]
            torch.testing.assert_close(parts[0] + parts[1], getattr(tables, field.name), rtol=1e-12, atol=0)
    for cell, flow_FE in whole.flows.items():
        assert torch.equal(left.flows[cell] + right.flows[cell], flow_FE)


def test_wanted_counts_do_not_depend_on_the_batch_size() -> None:
    """Dropless, in float32: of all assignments at most 1e-5 may differ."""
    encoder = sparse_encoder(torch.float32, **per_modality(2))
    lengths = [4 + 5 * i % 21 for i in range(60)]
    samples = {stream: make_samples(stream, lengths, encoder.config) for stream in STREAMS}
    counts = []
    for size in (5, 7, 60):
        with torch.no_grad(), trace(encoder, TASKS, SPECIAL) as found:
            for stream, some in samples.items():
                for start in range(0, len(some), size):
                    encoder(batch_of(stream, some[start : start + size], encoder.config))
        counts.append({cell: tables.wanted_KE for cell, tables in found.tables.items()})
    total = sum(int(wanted.sum()) for wanted in counts[0].values())
    assert total > 10_000
    for other in counts[1:]:
        moved = sum(int((wanted - other[cell]).clamp_min(0).sum()) for cell, wanted in counts[0].items())
        assert other.keys() == counts[0].keys() and moved <= 1e-5 * total


def test_a_trace_changes_no_output_and_its_hook_goes_with_the_block() -> None:
    encoder = sparse_encoder(**per_modality())
    batch = batch_of("pair", make_samples("pair", [7, 5], encoder.config), encoder.config)
    plain = encoder(batch).states_TD
    with trace(encoder) as found:
        assert torch.equal(encoder(batch).states_TD, plain)
    encoder(batch)
    assert found.tables[Cell("vlm", 0, "text")].num_tokens == 12
    assert not any(module._forward_hooks for module in encoder.modules())


def test_the_hook_goes_after_an_exception() -> None:
    encoder = sparse_encoder(**per_modality())
    with pytest.raises(KeyError), trace(encoder):
        assert encoder._forward_hooks
        raise KeyError
    assert not encoder._forward_hooks


def test_the_encoder_is_found_inside_a_model_and_its_batch_may_be_named() -> None:
    encoder = sparse_encoder(**per_modality())
    batch = batch_of("text", make_samples("text", [7], encoder.config), encoder.config)
    with trace(nn.ModuleDict({"module": nn.ModuleDict({"encoder": encoder})})) as found:
        encoder(batch=batch, intermediates=["embeddings"])
    assert found.tables[Cell("mlm", 0, "text")].num_tokens == 7


def test_the_encoder_of_a_frozen_tokenizer_is_not_the_models() -> None:
    encoder, visual = sparse_encoder(**per_modality()), OnlineTokenizer(random_tokenizer(), "fp32")
    model = nn.ModuleDict({"visual": visual, "encoder": encoder})
    assert encoder_of(model) is encoder
    with pytest.raises(ValueError, match="this one has 0"):
        encoder_of(visual)


def test_a_model_without_an_encoder_or_with_two_is_refused() -> None:
    for model, number in ((nn.Linear(2, 2), 0), (nn.ModuleList(sparse_encoder() for _ in range(2)), 2)):
        message = f"a model with one encoder can be traced, this one has {number}"
        with pytest.raises(ValueError, match=message), trace(model):
            pass


def test_a_task_without_a_name_of_its_own_stream_counts_under_the_name_given() -> None:
    encoder = sparse_encoder(**per_modality())
    with trace(encoder, {"pair": "vqa"}) as found:
        encoder(batch_of("pair", make_samples("pair", [7], encoder.config), encoder.config))
        encoder(batch_of("image", [], encoder.config))  # no token, so no task is asked for
    assert {cell.task for cell in found.tables} == {"vqa"}


def test_a_dense_model_gives_an_empty_trace() -> None:
    encoder = sparse_encoder()
    found, _ = traced(encoder, three_streams(encoder.config))
    assert found.tables == found.flows == found.pools == {}


@pytest.mark.parametrize("stream", STREAMS)
def test_one_sample(stream: StreamName) -> None:
    encoder = sparse_encoder(**per_modality(2, 0.6))
    assert_equals_hooks(*traced(encoder, [(stream, make_samples(stream, [5], encoder.config))]))


def test_one_expert() -> None:
    encoder = sparse_encoder(moe={name: {"num_experts": 1, "layers": [0, 1]} for name in ("vision", "text")})
    found, hooked = traced(encoder, three_streams(encoder.config))
    assert_equals_hooks(found, hooked)
    assert all(flow_FE.shape == (1, 1) for flow_FE in found.flows.values())


def test_experts_of_a_modality_without_tokens_have_no_cell() -> None:
    encoder = sparse_encoder(**per_modality())
    micros: list[tuple[StreamName, list[Sample]]] = [("text", make_samples("text", [7], encoder.config))]
    found, hooked = traced(encoder, [*micros, ("image", []), ("pair", [])])
    assert_equals_hooks(found, hooked)
    assert {cell.modality for cell in found.tables} == {"text"}


def test_memory_does_not_grow_with_tokens() -> None:
    """All that a trace does with a forward pass: tables, flows, facts."""
    encoder = sparse_encoder(torch.float32, **one_pool(1, 0.6))
    batch = batch_of("pair", make_samples("pair", [24] * 480, encoder.config), encoder.config)
    with torch.no_grad():
        encoded = encoder(batch)
    tokens = encoded.states_TD.shape[0]

    def feed(wanted: int) -> tuple[int, int]:
        found = Trace(encoder.config, VOCAB, special=SPECIAL)

        def work() -> None:
            for _ in range(wanted // tokens):
                found.receive(batch, encoded)

        peak = peak_bytes(work, list)
        counted = sum(tables.num_tokens for cell, tables in found.tables.items() if cell.layer == 0)
        assert wanted - tokens < counted <= wanted
        tensors = [t for tables in found.tables.values() for t in vars(tables).values()]
        return peak, total_bytes([*tensors, *found.flows.values()])

    feed(100_000)  # what a first call allocates for good
    (few_peak, few), (many_peak, many) = feed(100_000), feed(1_000_000)
    assert few == many and 0 < many_peak <= 1.1 * few_peak


def test_a_traced_model_tells_what_it_found() -> None:
    encoder = sparse_encoder(**per_modality(1))
    with torch.no_grad(), trace(encoder, special=SPECIAL) as traced:
        encoder(batch_of("pair", make_samples("pair", [6] * 8, encoder.config), encoder.config))
    cells = traced.summary([f"word{number}" for number in range(VOCAB)])
    assert {(cell.task, cell.modality) for cell in cells} == {("vlm", "vision"), ("vlm", "text")}
    assert all(sum(cell.first) == cell.tokens > 0 for cell in cells)
    assert all("word class" in cell.information for cell in cells if cell.modality == "text")
