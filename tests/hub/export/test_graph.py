"""The exportable module, run as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub.export.graph_support import (
    IMAGES_OF,
    STREAM_OF,
    against,
    assert_same,
    batch_for,
    finetuned,
    moe,
    pretrained,
    sparse,
    tensors,
)
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.errors import HubError, UsageError
from vlmoe_core.hub.export.answers import answers_of
from vlmoe_core.hub.export.compare import measure
from vlmoe_core.hub.export.graph import graph_of
from vlmoe_core.hub.export.reference import answer_natively
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.config import StreamCounts

LENGTHS = [5, 9, 2]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("more", [(), ("objective.weights.itc=1.0",)])
def test_pretrained(tmp_path: Path, stream: StreamName, more: tuple[str, ...]) -> None:
    trained = pretrained(tmp_path, *sparse(), *more)
    batch, graph = batch_for(trained, stream, LENGTHS), graph_of(trained, stream)
    found = graph(**tensors(graph, batch))
    assert_same(against(trained, stream, batch, found), batch, 1e-5)
    image, text = ["image_states", "image_logits"], ["text_states", "text_logits"]
    wanted = {"image": image, "text": text, "pair": image + text}[stream]
    wanted += [f"{stream}_vectors"] if more and stream != "pair" else []
    pools = {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}[stream]
    assert list(found) == wanted + [f"experts.0.{pool}" for pool in pools]


@pytest.mark.parametrize("task", STREAM_OF)
def test_tasks_that_choose(tmp_path: Path, task: str) -> None:
    trained, stream = finetuned(tmp_path, task, *sparse(eval_capacity_factor=1.0)), STREAM_OF[task]
    batch, graph = batch_for(trained, stream, LENGTHS, IMAGES_OF.get(task, 1)), graph_of(trained, stream)
    found = graph(**tensors(graph, batch))
    assert_same(against(trained, stream, batch, found), batch, 1e-5)
    assert list(answers_of(trained)) == [stream]
    assert found["logits"].shape[0] == 3


def test_two_sentences_are_kept_apart(tmp_path: Path) -> None:
    trained = finetuned(tmp_path, "nli", *sparse(), "task.pool=sentences")
    batch, graph = batch_for(trained, "text", LENGTHS, sentences=True), graph_of(trained, "text")
    inputs = tensors(graph, batch)
    found = graph(**inputs)
    assert_same(against(trained, "text", batch, found), batch, 1e-5)
    inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    assert not torch.allclose(graph(**inputs)["logits"], found["logits"])


@pytest.mark.parametrize("stream", STREAMS)
def test_retrieval(tmp_path: Path, stream: StreamName) -> None:
    trained = finetuned(tmp_path, "retrieval", *sparse())
    batch, graph = batch_for(trained, stream, LENGTHS), graph_of(trained, stream)
    found = graph(**tensors(graph, batch))
    assert_same(against(trained, stream, batch, found), batch, 1e-5)
    if stream != "pair":
        torch.testing.assert_close(found[f"{stream}_vectors"].norm(dim=1), torch.ones(3))


POOL = "{shared: {num_experts: 4, layers: [0], top_k: 2, router: bias-balanced}}"
BEIT3 = ("model.attention=per_modality", "model.norm=per_modality", "model.sub_norm=true", *sparse(experts="loop"))
VLMO = ("model.norm=per_modality", "model.positions=relative", "model.qkv_bias=qv", "model.text_embed_norm=true")


SHARED = ("model.expert_pool=shared", f"model.moe={POOL}", "model.positions=relative_shared")
COSINE = sparse(router="cosine", shared_expert="true", weights="renormalised", priority="position")
HASH = sparse(router="hash", noise=0.0, kept_experts="{0: [1, 3]}", removed="next")


@pytest.mark.parametrize("switches", [BEIT3, VLMO, SHARED, COSINE, HASH])
@pytest.mark.parametrize("stream", STREAMS)
def test_switches(tmp_path: Path, stream: StreamName, switches: tuple[str, ...]) -> None:
    trained = pretrained(tmp_path, *switches)
    batch, graph = batch_for(trained, stream, LENGTHS), graph_of(trained, stream)
    assert_same(against(trained, stream, batch, graph(**tensors(graph, batch))), batch, 1e-5)


def test_padding_takes_no_places(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse(eval_capacity_factor=0.5))
    batch, graph = batch_for(trained, "text", LENGTHS), graph_of(trained, "text")
    inputs = tensors(graph, batch)
    wider = {name: torch.nn.functional.pad(value, (0, 7)) for name, value in inputs.items()}
    got, wanted = graph(**wider), graph(**inputs)
    assert torch.equal(got["experts.0.text"], wanted["experts.0.text"])
    assert (wanted["experts.0.text"] == -1).any(), "a capacity of one half drops choices"
    assert got["experts.0.text"].shape[0] == sum(LENGTHS)
    torch.testing.assert_close(got["text_states"][:, :9], wanted["text_states"])
    assert not got["text_states"][:, 9:].any()


def test_other_paths_are_left_out_and_the_model_stays(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse())
    before = {name: value.clone() for name, value in trained.objective.state_dict().items()}
    graph = graph_of(trained, "image")
    names = [name for name, _ in graph.named_parameters()]
    assert any(".ffn.vision." in name for name in names)
    assert not [name for name in names if ".text." in name or ".vl." in name or ".word." in name]
    after = trained.objective.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    own = trained.objective.encoder.blocks[0].ffn["vision"].experts.up.weight  # type: ignore[union-attr,index]
    assert graph.encoder.blocks[0].ffn["vision"].experts.up.weight.data_ptr() == own.data_ptr()


def test_differences_and_flips_are_seen(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse())
    batch, graph = batch_for(trained, "text", LENGTHS), graph_of(trained, "text")
    wanted = answer_natively(trained, "text", batch)
    found = graph(**tensors(graph, batch))
    off = found | {"text_states": found["text_states"] + 0.25}
    assert measure(wanted, off, batch).max_difference == pytest.approx(0.25, abs=1e-5)
    flipped = found | {"experts.0.text": found["experts.0.text"].clone()}
    flipped["experts.0.text"][3, 0] = -1
    states = found["text_states"].clone()
    states[0, 3] += 9
    assert measure(wanted, flipped, batch).flipped_share == 1 / sum(LENGTHS)
    assert measure(wanted, flipped | {"text_states": states}, batch).max_difference < 1e-5
    assert measure(wanted, found | {"text_states": states}, batch).max_difference == pytest.approx(9, abs=1e-4)


def test_what_is_not_a_number_or_not_there_is_seen(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse())
    batch, graph = batch_for(trained, "text", LENGTHS), graph_of(trained, "text")
    wanted = answer_natively(trained, "text", batch)
    found = graph(**tensors(graph, batch))
    bad = found["text_logits"].clone()
    bad[1, 0, 0] = float("nan")
    assert measure(wanted, found | {"text_logits": bad}, batch).max_difference == float("inf")
    for name in found:
        less = {other: value for other, value in found.items() if other != name}
        with pytest.raises(HubError, match=f"answers nothing as {name}"):
            measure(wanted, less, batch)
        with pytest.raises(HubError, match=rf"answers \(.*\) as {name}, the model \("):
            measure(wanted, less | {name: found[name][..., :1]}, batch)


@pytest.mark.parametrize(("modality", "stream"), [("vision", "image"), ("text", "text")])
def test_contrast_with_one_path_has_one_graph(tmp_path: Path, modality: str, stream: StreamName) -> None:
    pool = f"model.moe={{{modality}: {moe()}}}"
    size = {name: 4 if name == stream else 0 for name in STREAMS}
    trained = pretrained(tmp_path, f"model.modality={modality}", "model.vl_layers=0", pool)
    whole = pretrained(tmp_path, *sparse(), "objective.weights.itc=1.0")
    batches = trained.recipe.batch.model_copy(update={"size": StreamCounts(**size)})
    recipe = trained.recipe.model_copy(update={"objective": whole.recipe.objective, "batch": batches})
    trained = replace(trained, recipe=recipe, objective=build_objective(recipe, None, Labels()).eval())
    assert list(answers_of(trained)) == [stream]
    batch, graph = batch_for(trained, stream, LENGTHS), graph_of(trained, stream)
    assert_same(against(trained, stream, batch, graph(**tensors(graph, batch))), batch, 1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"router": "random", "noise": 0.0}, "has the router 'random'"),
        ({"priority": "random", "eval_capacity_factor": 1.0}, "the priority 'random'"),
    ],
)
def test_chance_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        graph_of(pretrained(tmp_path, *sparse(**values)), "image")


def test_random_priority_is_nothing_where_none_is_dropped(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse(priority="random"))
    batch, graph = batch_for(trained, "text", LENGTHS), graph_of(trained, "text")
    assert_same(against(trained, "text", batch, graph(**tensors(graph, batch))), batch, 1e-5)


def test_a_path_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not trained on inputs of the kind 'image'; it has graphs for: text"):
        graph_of(finetuned(tmp_path, "nli"), "image")
    alone = pretrained(tmp_path)
    size = alone.recipe.batch.size.model_copy(update={"pair": 0})
    recipe = alone.recipe.model_copy(update={"batch": alone.recipe.batch.model_copy(update={"size": size})})
    with pytest.raises(UsageError, match="of the kind 'pair'; it has graphs for: image, text"):
        graph_of(replace(alone, recipe=recipe), "pair")
