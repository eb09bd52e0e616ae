"""What every task's objective must hold to: any cut, any rank, any parameter."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.support import SHARED, SPARSE
from tests.tasks.support import (
    CHOOSING,
    IMAGES,
    LENGTHS,
    QUIET,
    TASKS,
    backward,
    batches_of,
    objective_of,
    task_batches,
    task_samples,
)
from vlmoe_core.data.batch import Batch
from vlmoe_core.errors import DataError
from vlmoe_core.tasks.objective import Choosing, binary_cross_entropy, cross_entropy

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"moe": SPARSE},
    "sparse without VL": {"moe": SPARSE, "vl_layers": 0},
    "shared pool": SHARED,
    "shared pool without VL": {**SHARED, "vl_layers": 0},
    "norms of their own": {"moe": SPARSE, "norm": "per_modality", "vl_layers": 2},
    "norms of their own, shared pool": {**SHARED, "norm": "per_modality"},
}
PLAIN = [name for name in CHOOSING if name != "classification mixed"]
"""Tasks whose examples don't see each other."""
WITHOUT = {"image": "encoder.embeddings.text.", "text": "encoder.embeddings.image."}
"""What runs on no token in a stream."""


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_is_the_sum_of_its_parts(name: str) -> None:
    objective = objective_of(name, moe=QUIET).train()
    config = objective.encoder.config
    samples = task_samples(name, config)
    wanted, gradients = summed(objective, batches_of(name, samples, config))
    for sizes in ((2, 2), (1, 1, 1, 1), (3, 0, 1)):
        value, total, start = 0.0, dict.fromkeys(gradients, torch.zeros(())), 0
        for size in sizes:
            one, more = summed(objective, batches_of(name, samples[start : start + size], config))
            assert more.keys() == gradients.keys()
            value, start = value + one, start + size
            total = {key: total[key] + more[key] for key in total}
        assert value == pytest.approx(wanted, rel=1e-10)
        for key in gradients:
            torch.testing.assert_close(total[key], gradients[key], rtol=1e-9, atol=1e-10)


def summed(objective: Choosing, batches: Any) -> tuple[float, dict[str, Tensor]]:
    """The sum of the loss, not its mean, and its gradient."""
    objective.zero_grad()
    total = objective(batches).parts[objective.name].sum
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PLAIN)
def test_the_loss_by_its_formula(name: str) -> None:
    objective = objective_of(name, moe=QUIET).eval()
    batches = task_batches(name, objective.encoder.config)
    loss = objective(batches)
    targets = batches[TASKS[name].stream].targets
    assert targets is not None and loss.outputs is not None and not loss.outputs.requires_grad
    wanted = 0.0
    for logits, target in zip(loss.outputs.tolist(), targets.tolist(), strict=True):
        if isinstance(target, list):
            chances = [1 / (1 + math.exp(-x)) for x in logits]
            wanted -= sum(t * math.log(p) + (1 - t) * math.log(1 - p) for t, p in zip(target, chances, strict=True))
        else:
            wanted += math.log(sum(map(math.exp, logits))) - logits[target]
    (part,) = loss.parts.values()
    assert part.sum.item() == pytest.approx(wanted, rel=1e-9)
    assert (part.count, part.weight, part.streams) == (len(LENGTHS), 1.0, (TASKS[name].stream,))


@pytest.mark.parametrize("name", ["nlvr2", "nlvr"])
def test_pictures_of_an_example_stand_side_by_side_in_their_order(name: str) -> None:
    objective = objective_of(name).eval()
    config = objective.encoder.config
    seen: list[Tensor] = []
    objective.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    samples = task_samples(name, config)
    objective(batches_of(name, samples, config))
    objective.num_images = 1
    for row, sample in zip(seen.pop(), samples, strict=True):
        objective.head = torch.nn.Identity()
        singles = [replace(sample, pixels=p, more_pixels=()) for p in (sample.pixels, *sample.more_pixels)]
        alone = objective({"pair": replace(batches_of(name, singles, config)["pair"], targets=None)}).outputs
        torch.testing.assert_close(row, alone.flatten(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TASKS)
def test_trained_parameters_are_those_with_a_gradient(name: str, model: str) -> None:
    objective = objective_of(name, torch.float32, **MODELS[model]).train()
    config = objective.encoder.config
    for lengths in (LENGTHS, [3]):
        torch.manual_seed(0)
        loss, gradients = backward(objective, task_batches(name, config, lengths))
        trained = {n for n, p in objective.named_parameters() if p.requires_grad}
        assert gradients.keys() == trained
        assert all(torch.isfinite(g).all() for g in gradients.values())
        own = [part.sum for key, part in loss.parts.items() if not key.startswith("balance/")]
        assert min(own) > 0 or len(lengths) == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TASKS)
def test_frozen_parameters_are_those_never_met(name: str, model: str) -> None:
    objective = objective_of(name, torch.float32, **MODELS[model]).train()
    frozen = {n for n, p in objective.named_parameters() if not p.requires_grad}
    objective.requires_grad_(True)
    _, gradients = backward(objective, task_batches(name, objective.encoder.config))
    absent = {n for n, _ in objective.named_parameters()} - gradients.keys()
    no_tokens = {n for n in gradients if n.startswith(WITHOUT.get(TASKS[name].stream, ()))}
    assert frozen == absent | no_tokens
    assert all((gradients[n] == 0).all() for n in no_tokens)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TASKS)
def test_an_empty_batch_gives_zero_gradients(name: str, model: str) -> None:
    objective = objective_of(name, torch.float32, drop_path=0.1, **MODELS[model]).train()
    loss, gradients = backward(objective, task_batches(name, objective.encoder.config, []))
    assert gradients.keys() >= {n for n, p in objective.named_parameters() if p.requires_grad}
    assert all((g == 0).all() for g in gradients.values())
    assert all((part.count, part.sum.item()) == (0, 0.0) for part in loss.parts.values())
    assert loss.outputs is not None and loss.outputs.shape[0] == 0


@pytest.mark.parametrize("lengths", [LENGTHS, [3], []])
@pytest.mark.parametrize("model", ["sparse", "shared pool without VL"])
@pytest.mark.parametrize("name", TASKS)
def test_counts_are_what_forward_says(name: str, model: str, lengths: list[int]) -> None:
    objective = objective_of(name, torch.float32, **MODELS[model])
    batches = task_batches(name, objective.encoder.config, lengths)
    counts = objective.counts(batches)
    for training in (True, False):
        parts = objective.train(training)(batches).parts
        assert {key: part.count for key, part in parts.items()} == {key: counts[key] for key in parts}
        assert any(key.startswith("balance/") for key in parts) == training
    parts = objective.train()(batches).parts
    assert all(counts[key] == 0 for key in counts.keys() - parts.keys())


@pytest.mark.parametrize("name", CHOOSING)
def test_examples_without_a_target_count_nothing(name: str) -> None:
    objective = objective_of(name).train()
    samples = [replace(s, target=None) for s in task_samples(name, objective.encoder.config)]
    loss, gradients = backward(objective, batches_of(name, samples, objective.encoder.config))
    (part,) = loss.parts.values()
    assert (part.count, part.sum.item()) == (0, 0.0)
    assert loss.outputs is not None and loss.outputs.shape[0] == len(LENGTHS)
    assert all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize(("given", "taken"), [("nlvr2", "nlvr"), ("nlvr", "nlvr2"), ("nlvr2", "vqa")])
def test_another_number_of_pictures_is_refused(given: str, taken: str) -> None:
    objective = objective_of(taken)
    pictures, wanted = IMAGES[given] * len(LENGTHS), IMAGES.get(taken, 1)
    message = f"4 examples came with {pictures} pictures, the head takes {wanted} of each; set task.num_images"
    with pytest.raises(DataError, match=f"^{objective.name}: {message}"):
        objective(task_batches(given, objective.encoder.config))


def test_a_batch_is_changed_in_training_alone() -> None:
    objective = objective_of("classification mixed")
    batches = task_batches("classification mixed", objective.encoder.config)
    kept = objective.change
    calls: list[Batch] = []

    def spy(batch: Batch) -> Batch:
        calls.append(kept(batch))
        return calls[-1]

    objective.change = spy
    plain = objective.eval()(batches)
    assert not calls
    torch.manual_seed(0)
    mixed = objective.train()(batches)
    (changed,) = calls
    assert changed.targets is not None
    objective.change = None
    assert torch.equal(mixed.outputs, objective({"image": changed}).outputs)
    logs = torch.log_softmax(mixed.outputs, -1)
    assert mixed.parts["classification"].sum.item() == pytest.approx(-(changed.targets * logs).sum().item())
    assert mixed.parts["classification"].sum != plain.parts["classification"].sum


@pytest.mark.parametrize("name", ["vqa", "nli", "retrieval"])
def test_the_loss_is_float32_under_autocast(name: str) -> None:
    objective = objective_of(name, torch.float32, moe=SPARSE).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(task_batches(name, objective.encoder.config))
    assert {part.sum.dtype for part in loss.parts.values()} == {torch.float32}


def test_losses_are_sums_over_examples() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(3, 4)))
    logs = torch.log_softmax(logits, -1)
    assert cross_entropy(logits, torch.tensor([2, 0, 3])).item() == pytest.approx(
        -(logs[0, 2] + logs[1, 0] + logs[2, 3]).item()
    )
    shares = torch.softmax(torch.from_numpy(rng.normal(size=(3, 4))), -1)
    assert cross_entropy(logits, shares).item() == pytest.approx(-(shares * logs).sum().item())
    chances = torch.sigmoid(logits)
    wanted = -(shares * chances.log() + (1 - shares) * (1 - chances).log()).sum()
    assert binary_cross_entropy(logits, shares.float()).item() == pytest.approx(wanted.item(), rel=1e-6)
