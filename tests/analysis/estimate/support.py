"""Recipes for estimates, and real micro-batches of the sizes that they speak of."""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmoe_core.analysis.estimate.inputs import blank_batch, hidden_of, streams_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.recipe.config import Recipe

SCENES = [{"source": "scenes"}]
MODEL: dict[str, Any] = {
    "layers": 2, "dim": 64, "heads": 4, "hidden": 256, "vl_layers": 1, "patch_size": 8, "image_size": 64,
    "max_text_length": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "vision": {"num_experts": 8, "layers": [0]},
    "text": {"num_experts": 8, "layers": [0], "top_k": 2},
}
"""The first block's; the second, dense, has a VL-FFN."""


def recipe_of(
    model: dict[str, Any],
    micro: int = 2,
    num_micro: int = 1,
    streams: tuple[StreamName, ...] = STREAMS,
    vocab_size: int = 300,
    codes: int = 64,
    max_text: dict[str, int] | None = None,
    train: dict[str, Any] | None = None,
    **more: Any,
) -> Recipe:
    """Masked modelling, unless `more` says a task."""
    values = {
        "model": model,
        "tokenizers": {"text": {"vocab_size": vocab_size}, "visual": {"codebook_size": codes}},
        "data": {"train": dict.fromkeys(streams, SCENES), "max_text": max_text or {"text": 128, "pair": 64}},
        "batch": {
            "size": dict.fromkeys(streams, micro * num_micro),
            "micro": dict.fromkeys(streams, micro),
        },
        "train": {"steps": 10, **(train or {})},
        **({} if "task" in more else {"objective": {"name": "masked"}}),
    }
    return Recipe.model_validate({**values, **more})


def tokenizer_recipe() -> Recipe:
    """Training of a visual tokenizer."""
    return recipe_of(
        {"preset": "tiny", "vl_layers": 0, "modality": "vision"},
        streams=("image",),
        objective={"name": "vqkd", "code_dim": 16, "decoder_layers": 2},
    )


def real_batch(recipe: Recipe, stream: StreamName) -> Batch:
    """The same shapes as `blank_batch`, with pixels, words and masks."""
    blank = blank_batch(recipe, stream, recipe.batch.micro.of(stream))
    sequences, length, hidden = blank.num_sequences, recipe.tokens(stream)[1], hidden_of(recipe, stream)
    target_SL = torch.full((sequences, length), -1)
    target_SL[:, 1 : 1 + hidden.words] = 7
    mask_IP = torch.zeros_like(blank.patch_mask_IP)
    mask_IP[:, : hidden.patches] = True
    number_S = torch.arange(sequences)
    return replace(
        blank,
        pixels_ICHW=torch.randint(0, 256, blank.pixels_ICHW.shape, dtype=torch.uint8),
        patch_mask_IP=mask_IP,
        image_ids=number_S[: blank.num_images],
        sequence_of_image=number_S[: blank.num_images],
        text_ids_T=torch.randint(5, recipe.tokenizers.text.vocab_size, (sequences * length,)),
        text_targets_T=target_SL.flatten(),
        text_positions_T=torch.arange(length).repeat(sequences),
        sequence_of_text=number_S.repeat_interleave(length),
        example_of_sequence=number_S,
        positions=number_S,
    )


def real_batches(recipe: Recipe) -> dict[StreamName, Batch]:
    """The micro-batch of a recipe."""
    torch.manual_seed(0)
    return {stream: real_batch(recipe, stream) for stream in streams_of(recipe)}


def memory_recipe(precision: str, checkpointing: bool, num_micro: int = 1, **model: Any) -> Recipe:
    return recipe_of(
        {**MODEL, **model},
        micro=8,
        num_micro=num_micro,
        vocab_size=1500,
        codes=800,
        max_text={"text": 48, "pair": 32},
        train={"precision": precision, "activation_checkpointing": checkpointing},
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


class Storages(TorchDispatchMode):
    """The most bytes of distinct storages that results of operators lie in, at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, then look at everything that was ever seen."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            self.see(tensor)
        self.alive = {key: kept for key, kept in self.alive.items() if kept() is not None}
        storages = [kept() for kept in self.alive.values()]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in storages if storage is not None))
        return found

    def see(self, tensor: object) -> None:
        """Count a tensor's storage from now on, whatever its size will be."""
        if isinstance(tensor, DTensor):
            tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            self.alive[storage._cdata] = weakref.ref(storage)
