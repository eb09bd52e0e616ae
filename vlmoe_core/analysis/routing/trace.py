"""Routing statistics of the forward passes of a model, while they happen.

A trace listens at the encoder. It reads the plans that computed the outputs, and adds them to tables of a fixed size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe_core.analysis.routing.tables import Cell, Sizes, Tables, count, empty_tables
from vlmoe_core.analysis.routing.tokens import SpecialIds, TokenFacts, facts_of, stream_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoded, Encoder
from vlmoe_core.moe.plan import RoutingPlan
from vlmoe_core.tokenizers.frozen import Frozen

PRETRAINING_TASKS: Mapping[StreamName, str] = {"image": "mim", "text": "mlm", "pair": "vlm"}
"""What is learned from each stream in pretraining."""
Receive = Callable[[Batch, Encoded], None]


@dataclass(frozen=True)
class Rows:
    """The tokens of one modality in one sparse layer, of one forward pass."""

    cell: Cell
    """Where they are counted."""
    pool: str
    """The experts' pool: vision, text or shared."""
    plan: RoutingPlan
    """Their rows of the plan."""
    facts: TokenFacts
    """What they are."""


@dataclass
class Trace:
    """Statistics of all forward passes that were listened to."""

    config: ModelConfig
    """The encoder's."""
    vocab_size: int
    """Words of the text tokenizer."""
    tasks: Mapping[StreamName, str] = field(default_factory=lambda: dict(PRETRAINING_TASKS))
    """What is counted of each stream."""
    special: SpecialIds | None = None
    """Token ids that are no words."""
    num_classes: int = 0
    """Classes of the examples, where targets are classes."""
    tables: dict[Cell, Tables] = field(default_factory=dict)
    """The counts of each cell."""
    pools: dict[Cell, str] = field(default_factory=dict)
    """The pool of experts that each cell's tokens went to."""
    flows: dict[Cell, Tensor] = field(default_factory=dict)
    """(F, E) int64 tokens by their first choice in the sparse layer before (of the same modality) and in this one."""

    def receive(self, batch: Batch, encoded: Encoded) -> None:
        """Count one forward pass."""
        before: dict[str, Rows] = {}
        for rows in self.rows(batch, encoded):
            self._count(rows)
            if (last := before.get(rows.cell.modality)) is not None:
                self._count_flow(last, rows)
            before[rows.cell.modality] = rows

    def rows(self, batch: Batch, encoded: Encoded) -> Iterator[Rows]:
        """The tokens of each sparse layer and modality, from the first layer on."""
        facts = facts_of(batch, encoded.layout, self.special)
        if not facts:
            return
        task = self.tasks[stream_of(batch)]
        for routed in encoded.routed:
            images, tokens = routed.num_image_tokens, routed.plan.expert_TK.shape[0]
            for modality, start, stop in (("vision", 0, images), ("text", images, tokens)):
                if start < stop:
                    cell = Cell(task, routed.layer, modality)
                    yield Rows(cell, routed.pool, routed.plan.tokens(start, stop), facts[modality])

    def _count(self, rows: Rows) -> None:
        if rows.cell not in self.tables:
            self.pools[rows.cell] = rows.pool
            self.tables[rows.cell] = empty_tables(rows.cell.modality, self._sizes(rows), rows.plan.expert_TK.device)
        count(self.tables[rows.cell], rows.plan, rows.facts)

    def _count_flow(self, before: Rows, rows: Rows) -> None:
        shape = before.plan.num_experts, rows.plan.num_experts
        if rows.cell not in self.flows:
            self.flows[rows.cell] = torch.zeros(shape, dtype=torch.int64, device=rows.plan.expert_TK.device)
        places = before.plan.expert_TK[:, 0] * shape[1] + rows.plan.expert_TK[:, 0]
        self.flows[rows.cell].view(-1).index_add_(0, places, torch.ones_like(places))

    def _sizes(self, rows: Rows) -> Sizes:
        vision = rows.cell.modality == "vision"
        return Sizes(
            experts=rows.plan.num_experts,
            top_k=rows.plan.top_k,
            places=1 + self.config.num_patches if vision else self.config.max_text_length,
            words=0 if vision else self.vocab_size,
            classes=self.num_classes,
        )


@contextmanager
def listening(model: nn.Module, receive: Receive) -> Iterator[None]:
    """Hand over the batch and the result of every forward pass of the model's encoder.

    Raises ValueError where the model has no encoder, or several.
    """
    encoder = encoder_of(model)

    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], encoded: Encoded) -> None:
        receive(arguments[0] if arguments else named["batch"], encoded)

    handle = encoder.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def encoder_of(model: nn.Module) -> Encoder:
    """The model's encoder. Raises ValueError where it has none, or several."""
    found = encoders_of(model)
    if len(found) != 1:
        raise ValueError(f"a model with one encoder can be traced, this one has {len(found)}")
    return found[0]


def encoders_of(model: nn.Module) -> list[Encoder]:
    """The model's own encoders; that of a frozen visual tokenizer is none of them."""
    frozen = {inner for module in model.modules() if isinstance(module, Frozen) for inner in module.modules()}
    return [module for module in model.modules() if isinstance(module, Encoder) and module not in frozen]
