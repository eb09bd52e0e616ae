"""Floating-point operations of training, two a multiply-add: of pretraining by formulas, of a task by counting them.

Linear maps, convolutions and attention are counted, as torch's FlopCounterMode does. Every token of a sparse layer
counts `top_k` experts, dropped or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlmoe_core.analysis.estimate.fake import FEW, build_on_meta, fake_batches, forward, make_fake
from vlmoe_core.analysis.estimate.inputs import hidden_of, streams_of
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import Labels


@dataclass(frozen=True)
class Flops:
    """Of one example of a stream in training."""

    forward: int
    """The forward pass, heads included."""
    heads: int | None
    """The part of the heads in it; null: not told apart."""
    backward: int
    """The backward pass, without what is computed once more."""
    recompute: int | None
    """What activation checkpointing computes once more; 0 without it; null: it is in `backward`."""

    @property
    def total(self) -> int:
        """Forward, backward and what is computed once more."""
        return self.forward + self.backward + (self.recompute or 0)


def example_flops(recipe: Recipe, labels: Labels) -> dict[StreamName, Flops]:
    """Of one example of each stream, its text of the greatest length."""
    if recipe.task is not None:
        return {stream: _counted(recipe, labels) for stream in streams_of(recipe)}
    return {stream: _modelled(recipe, stream) for stream in streams_of(recipe)}


def step_flops(recipe: Recipe, flops: dict[StreamName, Flops]) -> int:
    """Of an optimiser step, over all devices."""
    return sum(one.total * recipe.batch.size.of(stream) for stream, one in flops.items())


def _modelled(recipe: Recipe, stream: StreamName) -> Flops:
    assert recipe.objective is not None, "a recipe pretrains or finetunes"
    model = recipe.model
    inputs = list(_inputs(recipe, stream))
    heads = recipe.objective.head_flops(stream, model, recipe.tokenizers, hidden_of(recipe, stream))
    once = sum(model.flops(*tokens) for tokens in inputs) + heads
    # The pixels have no gradient: of the map that reads them only the weights'.
    pixels = sum(model.pixel_flops * (image_tokens - 1) for image_tokens, _ in inputs if image_tokens)
    again = sum(recomputed(model, *tokens) for tokens in inputs) if recipe.train.activation_checkpointing else 0
    return Flops(once, heads, 2 * once - pixels, again)


def _inputs(recipe: Recipe, stream: StreamName) -> Iterator[tuple[int, int]]:
    """Image and text tokens of each pass of the encoder for one example."""
    assert recipe.objective is not None, "a recipe pretrains or finetunes"
    image_tokens, text_tokens = recipe.tokens(stream)
    for kind, times in recipe.objective.passes(stream).items():
        tokens = (image_tokens if kind != "text" else 0, text_tokens if kind != "image" else 0)
        yield from [tokens] * times


def recomputed(model: ModelConfig, image_tokens: int, text_tokens: int) -> int:
    """What the encoder computes once more for one sequence: its blocks, up to the last state that is asked for.

    Nobody asks for what the last linear map of a block makes, unless drop path or a layer scale comes behind it, so
    that the recomputation stops before it.
    """
    stem = model.patch_flops * (image_tokens - 1) if image_tokens else 0
    skipped = sum(_skipped(model, layer, image_tokens, text_tokens) for layer in range(model.layers))
    return model.flops(image_tokens, text_tokens) - stem - skipped


def _skipped(model: ModelConfig, layer: int, image_tokens: int, text_tokens: int) -> int:
    """The operations of a block's last linear map, if nobody asks for its output."""
    if model.layer_scale is not None or (model.drop_path > 0 and layer > 0):
        return 0
    tokens = {"vision": image_tokens, "text": text_tokens}
    last = model.passed(layer, [modality for modality, number in tokens.items() if number])[-1]
    if model.sparse(last, layer) is not None:  # the experts' operator, which keeps its outputs, comes last
        return 0
    return 2 * model.hidden * model.dim * tokens.get(last, image_tokens + text_tokens)


def _counted(recipe: Recipe, labels: Labels) -> Flops:
    """Counted in a step on fake tensors, attention by its plain products."""
    objective = build_on_meta(recipe, labels)
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), counter:
        make_fake(objective, recipe)
        _, total = forward(recipe, objective, fake_batches(recipe, dict.fromkeys(streams_of(recipe), FEW)))
        once = counter.get_total_flops()
        total.backward()  # type: ignore[no-untyped-call]
    both = counter.get_total_flops()
    return Flops(once // FEW, None, (both - once) // FEW, None)
