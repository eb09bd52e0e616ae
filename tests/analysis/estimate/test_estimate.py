"""Parameters, tokens of an expert and the whole estimate; and that no file is opened."""

import builtins
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from tests.analysis.estimate.support import recipe_of, tokenizer_recipe
from vlmoe_core.analysis.estimate.caveats import modelled_otherwise, not_counted
from vlmoe_core.analysis.estimate.estimate import Machine, estimate
from vlmoe_core.analysis.estimate.fake import build_on_meta
from vlmoe_core.analysis.estimate.inputs import hidden_of
from vlmoe_core.analysis.estimate.memory import follow_steps, memory_of
from vlmoe_core.analysis.estimate.parameters import Parameters, count_parameters
from vlmoe_core.data.config import STREAMS
from vlmoe_core.errors import UsageError
from vlmoe_core.model.config import PRESETS
from vlmoe_core.objectives.config import Hidden
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.stand_ins import MADE_UP_LABELS, stand_in_labels

EXPERTS: dict[str, Any] = {"vision": {"num_experts": 4}, "text": {"num_experts": 4, "top_k": 2}}
LOW = ("bf16", "fp16")
TINY = {"preset": "tiny", "layers": 2, "vl_layers": 0, "moe": EXPERTS}


def sparse(experts: int) -> dict[str, Any]:
    return {"vision": {"num_experts": experts}, "text": {"num_experts": experts}}


def parameters_of(recipe: Recipe) -> Parameters:
    return count_parameters(recipe, build_on_meta(recipe, NO_LABELS))


@pytest.mark.parametrize("moe", [{}, sparse(32)], ids=["dense", "sparse"])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_equal_the_built_model(preset: str, moe: dict[str, Any]) -> None:
    recipe = recipe_of({"preset": preset, "moe": moe}, vocab_size=30522, codes=8192)
    found = parameters_of(recipe)
    with torch.device("meta"):
        built = dict(build_objective(recipe, None).named_parameters())
    of = {name: parameter.numel() for name, parameter in built.items()}
    idle = sum(size * 31 // 32 for name, size in of.items() if ".experts." in name)
    assert found.total == sum(of.values())
    assert found.encoder == sum(size for name, size in of.items() if name.startswith("encoder."))
    assert found.heads == found.total - found.encoder
    assert found.routers == sum(size for name, size in of.items() if ".router." in name)
    assert found.active == found.total - idle and found.encoder_active == found.encoder - idle


def test_the_sizes_of_the_paper() -> None:
    base = parameters_of(recipe_of({"preset": "base", "moe": sparse(32)}, vocab_size=30522, codes=8192))
    small = parameters_of(recipe_of({"preset": "small", "moe": sparse(16)}, vocab_size=30522, codes=8192))
    assert base.encoder == pytest.approx(1.93e9, rel=0.005)
    assert base.encoder_active == pytest.approx(180e6, rel=0.03)
    assert small.encoder == pytest.approx(179e6, rel=0.005)


@pytest.mark.parametrize(
    "recipe", [tokenizer_recipe(), recipe_of(TINY, objective={"name": "masked", "weights": {"itc": 1}})]
)
def test_heads_of_other_objectives(recipe: Recipe) -> None:
    with torch.device("meta"):
        built = build_objective(recipe, None)
    assert parameters_of(recipe).total == sum(parameter.numel() for parameter in built.parameters())


TASKS: dict[str, dict[str, Any]] = {
    "vqa": {"streams": ("pair",), "labels": 7},
    "retrieval": {"streams": ("pair",)},
    "nlvr2": {"streams": ("pair",)},
    "classification": {"streams": ("image",), "labels": 7},
    "nli": {"streams": ("text",)},
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task(name: str) -> None:
    (stream,), labels = TASKS[name]["streams"], TASKS[name].get("labels")
    experts = {"num_experts": 4, "layers": [0]}
    model = {**TINY, "layers": 1, "moe": {"vision": experts, "text": experts}}
    recipe = recipe_of(model, task={"name": name}, init="scratch", streams=(stream,))
    found = estimate(recipe, Machine(), num_labels=labels)
    with torch.device("meta"):
        built = build_objective(recipe, None, stand_in_labels(recipe, labels or 0))
    assert found.parameters.total == sum(parameter.numel() for parameter in built.parameters())
    passes = {"nlvr2": 2}.get(name, 1) * recipe.flops(stream)
    if name == "retrieval":  # images and texts alone, then three times as many pairs
        passes = recipe.model.flops(65, 0) + recipe.model.flops(0, 64) + 3 * recipe.flops("pair")
    assert found.flops[stream].forward == pytest.approx(passes, rel=0.05)
    assert found.flops[stream].backward == pytest.approx(2 * found.flops[stream].forward, rel=0.06)
    assert found.flops_how == "counted" and found.labels == labels
    assert ("the head has 7 labels" in found.otherwise[0]) == (labels == 7)
    assert any("the loss on the labels" in line for line in found.not_counted) == (name != "retrieval")
    assert found.memory.peak() > found.memory.always > 0


def test_labels_that_nobody_counted() -> None:
    recipe = recipe_of(TINY, task={"name": "classification"}, init="scratch", streams=("image",))
    assert estimate(recipe, Machine()).labels == MADE_UP_LABELS


@pytest.mark.parametrize(
    ("aim", "kind"),
    [
        ({"task": {"name": "nlvr2"}, "init": "scratch"}, "the task nlvr2"),
        ({"task": {"name": "retrieval"}, "init": "scratch"}, "the task retrieval"),
        ({}, "pretraining"),
    ],
)
def test_a_number_of_labels_that_nobody_needs_is_refused(aim: dict[str, Any], kind: str) -> None:
    with pytest.raises(
        UsageError, match=f"^--labels 7: {kind} has no labels that its data decide on; leave the option"
    ):
        estimate(recipe_of(TINY, streams=("pair",), **aim), Machine(), num_labels=7)


def test_hidden_words_and_patches() -> None:
    recipe = recipe_of(TINY, mask={"text": 0.15, "pair_text": 0.5, "image_count": 20})
    assert [hidden_of(recipe, stream) for stream in STREAMS] == [Hidden(0, 20), Hidden(19, 0), Hidden(31, 20)]
    rates = recipe_of(TINY, mask={"image": 0.4, "pair_image": 0.25})
    assert (hidden_of(rates, "image").patches, hidden_of(rates, "pair").patches) == (26, 16)
    assert hidden_of(tokenizer_recipe(), "image") == Hidden()


def test_tokens_of_an_expert() -> None:
    found = estimate(recipe_of(TINY, micro=3, num_micro=4), Machine(world=4))
    groups = {(group.stream, group.pool): group for group in found.groups}
    assert set(groups) == {("image", "vision"), ("text", "text"), ("pair", "vision"), ("pair", "text")}
    text, pair = groups["text", "text"], groups["pair", "vision"]
    assert (text.layers, text.tokens, text.choices, text.capacity) == (1, 3 * 128, 2 * 3 * 128, 240)
    assert (text.mean, text.places, text.effective_batch) == (192, 960, 4 * 192)
    assert (pair.layers, pair.tokens, pair.capacity) == (1, 3 * 65, 61)
    dropless = {**TINY, "moe": {"text": {"num_experts": 4, "capacity_factor": None}}}
    (group,) = estimate(recipe_of(dropless, streams=("text",)), Machine()).groups
    assert group.capacity is None and group.places is None


def test_hours_need_a_rate() -> None:
    recipe = recipe_of(TINY, num_micro=2)
    assert estimate(recipe, Machine()).hours is None
    found = estimate(recipe, Machine(world=2, tflops=0.5))
    assert found.hours == pytest.approx(10 * found.step_flops / (2 * 0.5e12) / 3600)


def test_devices_that_do_not_share_a_step_evenly() -> None:
    with pytest.raises(UsageError, match=r"^4 micro-batches a step .* to 3 processes; .* fit: 1, 2, 4; or change"):
        estimate(recipe_of(TINY, num_micro=4), Machine(world=3))


def test_it_says_what_it_leaves_out_and_assumes() -> None:
    loop = {"preset": "tiny", "moe": {"text": {"num_experts": 2, "experts": "loop"}}, "sub_norm": True}
    recipe = recipe_of(loop, train={"compile": True})
    left_out = "\n".join(not_counted(recipe, "gpu"))
    for part in ("fragments", "CUDA context", "data loader", "visual tokenizer (codebook)"):
        assert part in left_out
    assert "buffers" not in left_out and "library of communication" in "\n".join(not_counted(recipe, "gpu", 2))
    assumed = "\n".join(modelled_otherwise(recipe, "gpu", 7))
    assert "7 labels" in assumed and "moe.text.experts is loop" in assumed and "train.compile" in assumed
    assert "CUDA" not in "\n".join(not_counted(recipe, "cpu"))
    assert "grouped kernel" not in assumed and "autocast" not in assumed
    low = {name: "\n".join(modelled_otherwise(recipe_of(loop, train={"precision": name}), "gpu", None)) for name in LOW}
    assert "grouped kernel" in low["bf16"] and "grouped kernel" not in low["fp16"] and "autocast" in low["fp16"]
    stored = {"text": {"vocab_size": 300}, "visual": {"codebook_size": 64, "tokens": "nowhere"}}
    assert "visual tokenizer" not in "\n".join(not_counted(recipe_of(TINY, tokenizers=stored), "gpu"))
    assert "teacher" in "\n".join(not_counted(tokenizer_recipe(), "gpu"))


def test_experts_with_norms_of_their_own() -> None:
    loop = {"preset": "tiny", "layers": 2, "moe": {"text": {"num_experts": 2, "experts": "loop"}}, "sub_norm": True}
    recipe = recipe_of(loop)
    memory, parameters = memory_of(recipe, NO_LABELS, "gpu", follow_steps(recipe, NO_LABELS)), parameters_of(recipe)
    assert memory.plain.sparse > 0
    assert memory.weights == memory.gradients == 4 * parameters.total and memory.moments == 8 * parameters.total
    assert memory.checkpoint == 12 * parameters.total


def test_as_json() -> None:
    found = estimate(recipe_of(TINY, streams=("text", "pair")), Machine("cpu", 1, 2.0))
    told = json.loads(json.dumps(found.as_json()))
    assert told["params"] == {"how": "exact", **asdict(found.parameters)}
    assert told["flops"]["step"] == found.step_flops and set(told["flops"]["examples"]) == {"text", "pair"}
    assert told["memory"]["peak"] == told["memory"]["plain"]["peak"] == found.memory.peak(False)
    assert told["memory"]["checkpointed"]["peak"] == found.memory.peak(True)
    assert told["world"] is None and told["memory"]["plain"]["worst_peak"] == told["memory"]["peak"]
    assert (told["time"]["tflops"], told["time"]["hours"]) == (2.0, found.hours)


def test_it_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [{"source": "tar", "path": "absent/*.tar", "text_field": "caption"}]
    absent = {
        "data": {"root": "absent", "train": {"pair": sources}},
        "tokenizers": {
            "text": {"load": "absent", "vocab_size": 300},
            "visual": {"load": "absent", "codebook_size": 64},
        },
    }
    recipe = recipe_of(TINY, streams=("pair",), **absent)
    estimate(recipe, Machine())  # python's own imports
    opened: list[str] = []

    def noting(opens: Callable[..., Any]) -> Callable[..., Any]:
        def note(file: Any, *more: Any, **options: Any) -> Any:
            opened.append(str(file))
            return opens(file, *more, **options)

        return note

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    estimate(recipe, Machine(tflops=1.0))
    monkeypatch.undo()
    assert opened == []
