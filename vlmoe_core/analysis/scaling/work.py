"""What the model and a micro-batch of a recipe ask of the devices, by formulas alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Literal

from vlmoe_core.analysis.estimate.flops import example_flops
from vlmoe_core.analysis.estimate.inputs import hidden_of, streams_of
from vlmoe_core.errors import UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS

Kind = Literal["image", "text", "pair"]
MODALITIES = {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}
KEPT, KEPT_CHECKPOINTED, LOGITS = 44, 4.5, 8
"""Bytes of activations in bf16: of a token, layer and width, without and with activation checkpointing; of a logit.
Rounded from what `vlmoe estimate` counts."""


@dataclass(frozen=True)
class Pass:
    """The sparse layers of one pool that one kind of input passes in a micro-batch, each time the encoder runs."""

    pool: str
    """Whose experts."""
    layers: int
    """How many sparse layers."""
    rows: int
    """Tokens times their choices, in each layer."""


@dataclass(frozen=True)
class Work:
    """What there is to do and to hold."""

    flops: int
    """Operations of a micro-batch, forward and backward, recomputation included."""
    useful: int
    """The same without recomputation."""
    expert_flops: int
    """The part of the experts in `flops`."""
    passes: tuple[Pass, ...]
    """What travels."""
    runs: int
    """How often the encoder runs in a micro-batch."""
    dense: int
    """Parameters that are not experts'."""
    block: int
    """Parameters of a block that are not experts', the mean of all blocks."""
    layer: int
    """Parameters of all experts of a sparse layer."""
    sparse: int
    """Sparse layers of all pools."""
    layers: int
    """Blocks."""
    experts: int
    """What an expert degree must divide: the greatest common divisor of the numbers of experts."""
    dim: int
    """Width of a token."""
    hidden: int
    """Width inside an expert."""
    element: int
    """Bytes of a number on its way."""
    activations: float
    """Bytes that a micro-batch keeps for its backward pass."""
    capacity: float | None
    """The largest capacity factor in training; null: some pool is dropless, or there is none."""
    checkpointed: bool
    """Whether the forward pass is repeated in the backward one."""

    @property
    def shared(self) -> int:
        """Parameters of all experts."""
        return self.layer * self.sparse


def work_of(recipe: Recipe) -> Work:
    """Count.

    Raises:
        UsageError: the recipe finetunes, which is not reckoned here, or the experts of its pools differ in number.
    """
    if recipe.objective is None:
        raise UsageError("the cost model reckons with pretraining; this recipe finetunes")
    model, micro = recipe.model, recipe.batch.micro
    flops = example_flops(recipe, NO_LABELS)
    passes = tuple(_passes(recipe))
    num_experts = {moe.num_kept(layer) for pool, moe in model.pools.items() for layer in model.sparse_layers(pool)}
    if len(num_experts) > 1:
        raise UsageError(f"the cost model wants as many experts in each layer, not {sorted(num_experts)}")
    experts = gcd(*num_experts)
    layer = experts * ((model.dim + 1) * model.hidden + (model.hidden + 1) * model.dim)
    sparse = sum(len(model.sparse_layers(pool)) for pool in model.pools)
    dense = recipe.num_params() - layer * sparse
    repeats = 4 if recipe.train.activation_checkpointing else 3
    factors = [moe.capacity_factor for moe in model.pools.values()]
    total = sum(one.total * micro.of(stream) for stream, one in flops.items())
    again = sum((one.recompute or 0) * micro.of(stream) for stream, one in flops.items())
    return Work(
        flops=total,
        useful=total - again,
        expert_flops=sum(repeats * 4 * model.dim * model.hidden * one.rows * one.layers for one in passes),
        passes=passes,
        runs=sum(sum(recipe.objective.passes(stream).values()) for stream in streams_of(recipe)),
        dense=dense,
        block=(model.num_params(0) - layer * sparse) // model.layers,
        layer=layer,
        sparse=sparse,
        layers=model.layers,
        experts=experts,
        dim=model.dim,
        hidden=model.hidden,
        element=4 if recipe.train.precision == "fp32" else 2,
        activations=_activations(recipe),
        capacity=None if not factors or None in factors else float(max(factors)),  # type: ignore[type-var, arg-type]
        checkpointed=recipe.train.activation_checkpointing,
    )


def _inputs(recipe: Recipe) -> Iterator[tuple[Kind, int, int]]:
    """Each run of the encoder in a micro-batch: kind of input, image tokens, text tokens."""
    assert recipe.objective is not None, "checked before"
    for stream in streams_of(recipe):
        image_tokens, text_tokens = recipe.tokens(stream)
        examples = recipe.batch.micro.of(stream)
        for kind, times in recipe.objective.passes(stream).items():
            images, texts = (kind != "text") * image_tokens, (kind != "image") * text_tokens
            yield from [(kind, examples * images, examples * texts)] * times


def _passes(recipe: Recipe) -> Iterator[Pass]:
    model = recipe.model
    for kind, images, texts in _inputs(recipe):
        passed = Counter(
            name
            for layer in range(model.layers)
            for name in model.passed(layer, MODALITIES[kind])
            if model.sparse(name, layer) is not None
        )
        tokens = {"vision": images, "text": texts, "shared": images + texts}
        yield from (Pass(pool, layers, tokens[pool] * model.pools[pool].top_k) for pool, layers in passed.items())


def _activations(recipe: Recipe) -> float:
    """Of all blocks; with activation checkpointing of what lies between them, and of one block of the longest input."""
    model = recipe.model
    lengths = [images + texts for _, images, texts in _inputs(recipe)]
    logits = 0
    for stream in streams_of(recipe):
        hidden = hidden_of(recipe, stream)
        words, codes = recipe.tokenizers.text.vocab_size, recipe.tokenizers.visual.codebook_size
        logits += recipe.batch.micro.of(stream) * (hidden.words * words + hidden.patches * codes)
    wide = model.dim * (1 if recipe.train.precision != "fp32" else 2)
    if not recipe.train.activation_checkpointing:
        return wide * KEPT * model.layers * sum(lengths) + LOGITS * logits
    return wide * (KEPT_CHECKPOINTED * model.layers * sum(lengths) + KEPT * max(lengths)) + LOGITS * logits
