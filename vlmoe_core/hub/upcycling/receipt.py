"""What upcycling did to a model, measured: how far its outputs moved, how its experts are loaded, what is dropped.

Axis letters: T tokens, E experts, K choices of a token.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe_core.analysis.routing.measures import gini
from vlmoe_core.analysis.routing.trace import encoder_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.decimals import exact
from vlmoe_core.hub.upcycling.samples import Samples
from vlmoe_core.model.block import Routed
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoded
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.health import chosen, tally
from vlmoe_core.moe.plan import capacity_of, make_plan
from vlmoe_core.objectives.loss import Loss
from vlmoe_core.train.evaluate import draw_as_held_out

FACTORS = (1.0, 1.25, 1.5, 2.0)
"""Capacity factors whose drops are told beside those of the model's own."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model, heads included."""

    total: int
    """All of them."""
    active: int
    """Those that a token of each modality uses: of E experts only k."""


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on the same examples."""

    states: float
    """Largest absolute difference of the encoder's final states."""
    largest_state: float
    """Largest absolute value of the dense model's final states."""
    outputs: float | None
    """Largest absolute difference of what a task's head says; null in pretraining and of an encoder alone."""
    loss_before: float | None
    """The dense model's loss, its parts weighted, balance left out; null of an encoder alone."""
    loss_after: float | None
    """The upcycled model's."""


@dataclass(frozen=True)
class Load:
    """How the tokens spread over the experts of one layer, in evaluation."""

    layer: int
    """0-based block."""
    modality: str
    """vision or text."""
    tokens: int
    """Tokens that were routed; 0: the examples held none for this layer."""
    busiest: float | None
    """Share of all choices that went to the busiest expert; even: 1 / E."""
    idlest: float | None
    """Share that went to the idlest one."""
    gini: float | None
    """Gini coefficient of the load: 0 where it is even."""
    dropped: float | None
    """Share of the choices that the training capacity would drop, under training's noise; 0 of a dropless layer."""


@dataclass(frozen=True)
class Receipt:
    """What upcycling did. Shares are of 1."""

    source: str
    """The dense model."""
    step: int
    """Optimiser steps it was trained for."""
    experts: int
    """E."""
    top_k: int
    """k."""
    weights: str
    """How the outputs of a token's experts are combined."""
    capacity_factor: float | None
    """Of training; null: dropless."""
    noise: float
    """Noise on the copies, relative to the spread of each weight matrix."""
    drop: float
    """Share of each expert's hidden units that were drawn anew."""
    router_std: float
    """Standard deviation of the routers' weights."""
    seed: int
    """Of what was drawn."""
    layers: Mapping[str, tuple[int, ...]]
    """The blocks that became sparse, by modality."""
    samples: str
    """What was compared on."""
    examples: Mapping[StreamName, int]
    """How many of each stream."""
    difference: Difference
    """From the dense model, in evaluation."""
    loads: tuple[Load, ...]
    """Of each sparse layer that is new."""
    dropped: Mapping[str, float]
    """Share of all choices that a capacity would drop, by its factor."""
    before: Parameters
    """Of the dense model."""
    after: Parameters
    """Of the upcycled model."""
    moments: bool
    """Whether the optimiser's state came along."""
    notes: tuple[str, ...]
    """What a reader should know."""

    def as_json(self) -> dict[str, Any]:
        """For upcycle.json and machines."""
        return asdict(self)


@dataclass
class _Counts:
    """Counts of one layer, or of several, that add up over routing groups."""

    tally: Tensor | None = None
    choices: int = 0
    lost: dict[float, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """What one model made of one micro-batch."""

    encoded: tuple[Encoded, ...]
    loss: Loss


class Comparison:
    """Runs the dense and the upcycled model over the samples and keeps what a receipt tells."""

    def __init__(self, model: ModelConfig, pools: Mapping[str, MoEConfig]) -> None:
        """`model` is the upcycled one; `pools` are those of its pools that are new."""
        self.pools = pools
        self.factors = sorted({*FACTORS, *(m.capacity_factor for m in pools.values() if m.capacity_factor)})
        self.counts = {(layer, pool): _Counts() for pool in pools for layer in model.sparse_layers(pool)}
        self._states, self._scale = 0.0, 0.0
        self._outputs: float | None = None
        self._sums: dict[str, list[float]] = {}

    @torch.no_grad()
    def run(self, dense: nn.Module, sparse: nn.Module, samples: Samples) -> None:
        """Both models are in evaluation mode; an encoder alone takes samples that are not whole."""
        for micro in samples.micros:
            before, after = (_see(m, micro.batches, micro.number, samples.whole) for m in (dense, sparse))
            for old, new in zip(before.encoded, after.encoded, strict=True):
                self._states = max(self._states, _largest(new.states_TD - old.states_TD))
                self._scale = max(self._scale, _largest(old.states_TD))
            if before.loss.outputs is not None and after.loss.outputs is not None:
                apart = _largest(after.loss.outputs - before.loss.outputs)
                self._outputs = max(self._outputs or 0.0, apart)
            self._add_losses(before.loss, after.loss)
            for one in (routed for encoded in after.encoded for routed in encoded.routed):
                self._add_plan(one)

    @property
    def difference(self) -> Difference:
        """How far the models are apart."""
        return Difference(self._states, self._scale, self._outputs, self._mean_loss(0), self._mean_loss(1))

    @property
    def loads(self) -> tuple[Load, ...]:
        """The load of each layer, by block."""
        return tuple(_load(*site, self.counts[site], self.pools[site[1]]) for site in sorted(self.counts))

    @property
    def dropped(self) -> dict[str, float]:
        """The share of all choices that each capacity would drop."""
        choices = max(1, sum(one.choices for one in self.counts.values()))
        lost = {factor: sum(one.lost.get(factor, 0) for one in self.counts.values()) for factor in self.factors}
        return {f"{factor:g}": count / choices for factor, count in lost.items()}

    def _add_losses(self, before: Loss, after: Loss) -> None:
        for name, part in before.parts.items():
            weighted = (part.weight * float(part.sum), part.weight * float(after.parts[name].sum), float(part.count))
            known = self._sums.get(name, [0.0, 0.0, 0.0])
            self._sums[name] = [old + new for old, new in zip(known, weighted, strict=True)]

    def _mean_loss(self, model: int) -> float | None:
        means = [sums[model] / sums[2] for sums in self._sums.values() if sums[2]]
        return sum(means) if means else None

    def _add_plan(self, one: Routed) -> None:
        counts, tokens = self.counts.get((one.layer, one.pool)), one.plan.expert_TK.shape[0]
        if counts is None or not tokens:
            return
        own = tally(one.plan)
        counts.tally = own if counts.tally is None else counts.tally + own
        counts.choices += one.plan.expert_TK.numel()
        slot_TK = _training_slots(one, self.pools[one.pool])
        for factor in self.factors:
            places = capacity_of(tokens, one.plan.num_experts, one.plan.top_k, exact(factor))
            assert places is not None, "a factor gives places"
            counts.lost[factor] = counts.lost.get(factor, 0) + int((slot_TK >= places).sum())


def parameters_of(model: nn.Module, config: ModelConfig, vocab_size: int) -> Parameters:
    """Counted on the module; idle experts by its config."""
    stored = model.state_dict()
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if name in stored)
    idle = config.num_params(vocab_size) - config.num_active_params(vocab_size)
    return Parameters(total, total - idle)


def _see(model: nn.Module, batches: Mapping[StreamName, Batch], number: int, whole: bool) -> _Seen:
    """Run a model on a micro-batch, and listen to its encoder."""
    made: list[Encoded] = []
    encoder = encoder_of(model)
    draw_as_held_out(number)
    if not whole:
        return _Seen(tuple(encoder(batch) for batch in batches.values()), Loss({}))
    hook = encoder.register_forward_hook(lambda _module, _inputs, encoded: made.append(encoded))
    try:
        loss: Loss = model(batches)
    finally:
        hook.remove()
    return _Seen(tuple(made), loss)


def _training_slots(one: Routed, moe: MoEConfig) -> Tensor:
    """The places of the choices (T, K), were the group routed in training: with noise, in the order of training."""
    clean_TE, std = one.plan.clean_logits_TE, moe.noise / moe.num_experts
    plan = make_plan(
        clean_TE,
        clean_TE + std * torch.randn_like(clean_TE),
        top_k=moe.top_k,
        weights=moe.weights,
        priority=moe.priority,
        capacity=None,
        noise_std=std,
    )
    return plan.slot_TK


def _load(layer: int, modality: str, counts: _Counts, moe: MoEConfig) -> Load:
    if counts.tally is None:
        return Load(layer, modality, 0, None, None, None, None)
    load_E = chosen(counts.tally).double().round().long().numpy()
    lost = counts.lost[moe.capacity_factor] if moe.capacity_factor is not None else 0
    return Load(
        layer,
        modality,
        tokens=counts.choices // moe.top_k,
        busiest=float(load_E.max() / load_E.sum()),
        idlest=float(load_E.min() / load_E.sum()),
        gini=gini(load_E),
        dropped=lost / counts.choices,
    )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
