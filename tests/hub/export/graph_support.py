"""Small random models of every kind, and batches for them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.model.support import collate_of, randomise, samples_of
from tests.train.support import tiny
from tests.train.tasks_support import tuned
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.hub.export.compare import Compared, measure, plain_inputs, visible
from vlmoe_core.hub.export.graph import Graph
from vlmoe_core.hub.export.reference import answer_natively
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.trained import Trained

LABELS = Labels(("a", "b", "c"))
LONGEST = 24
"""Tokens of the longest text of the models."""
WIDER = ("model.dim=32", "model.heads=4", "model.hidden=48")
STREAM_OF: dict[str, StreamName] = {"vqa": "pair", "nlvr2": "pair", "classification": "image", "nli": "text"}
IMAGES_OF = {"nlvr2": 2}


def moe(**values: Any) -> str:
    """A sparse pool as an override says it: 4 experts, 2 a token, in block 0."""
    said = {"num_experts": 4, "layers": [0], "top_k": 2, **values}
    return "{" + ", ".join(f"{key}: {'null' if value is None else value}" for key, value in said.items()) + "}"


def sparse(**values: Any) -> tuple[str, str]:
    """Overrides: both modalities have such a pool."""
    return f"model.moe.vision={moe(**values)}", f"model.moe.text={moe(**values)}"


def pretrained(folder: Path, *overrides: str) -> Trained:
    """A model for masked modelling, every parameter random."""
    return _trained(folder, tiny(folder, *WIDER, *overrides).recipe, Labels())


def finetuned(folder: Path, task: str, *overrides: str) -> Trained:
    """A model for a task, every parameter random."""
    return _trained(folder, tuned(folder, task, *WIDER, *overrides).recipe, LABELS)


def _trained(folder: Path, recipe: Any, labels: Labels) -> Trained:
    objective = build_objective(recipe, None, labels).eval()
    randomise(objective)
    for layer in objective.modules():
        if isinstance(layer, SparseFFN) and hasattr(layer.router, "weight"):
            torch.nn.init.normal_(layer.router.weight, std=1.0)
    return Trained(folder, 0, recipe, None, objective)  # type: ignore[arg-type]


def dropping_all(folder: Path) -> Trained:
    """A model of which every choice in block 0 falls on an expert that was removed."""
    trained = pretrained(folder, *sparse(kept_experts="{0: [2, 3]}", removed="drop"))
    for layer in trained.objective.modules():
        if isinstance(layer, SparseFFN):
            torch.nn.init.zeros_(layer.router.weight)  # type: ignore[arg-type]  # of equal gates the first two
    return trained


def batch_for(
    trained: Trained, stream: StreamName, lengths: Sequence[int], num_images: int = 1, sentences: bool = False
) -> Batch:
    """Random examples, one for each text length."""
    samples = samples_of(stream, lengths, trained.recipe.model, seed=len(lengths))
    if num_images > 1:
        samples = [replace(s, more_pixels=(np.flip(s.pixels),) * (num_images - 1)) for s in samples]  # type: ignore[arg-type]
    if sentences:
        samples = [replace(s, second_text_at=1 + n // 2) for s, n in zip(samples, lengths, strict=True)]
    return visible(collate_of(stream, samples, trained.recipe.model), stream)


def tensors(graph: Graph, batch: Batch) -> dict[str, torch.Tensor]:
    """The inputs of a graph."""
    inputs = plain_inputs(batch, graph.answer.num_images, graph.answer.keeps_sentences_apart)
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def against(trained: Trained, stream: StreamName, batch: Batch, found: dict[str, torch.Tensor]) -> Compared:
    """Outputs beside the model's own."""
    return measure(answer_natively(trained, stream, batch), found, batch)


def assert_same(got: Compared, batch: Batch, within: float = 1e-4) -> None:
    """Nothing flipped, everything within the bound."""
    assert got.flipped_share == 0
    assert got.max_difference <= within
    assert (got.samples, got.tokens > 0) == (batch.num_examples, True)
