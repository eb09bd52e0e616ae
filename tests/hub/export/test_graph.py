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
    pretrained,
    sparse,
    tensors,
)
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.export.answers import answers_of
from vlmoe_core.hub.export.compare import measure
from vlmoe_core.hub.export.graph import graph_of
from vlmoe_core.hub.export.program import check_options
from vlmoe_core.hub.export.reference import answer_natively

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


BEIT3 = ("model.attention=per_modality", "model.norm=per_modality", "model.sub_norm=true", *sparse(experts="loop"))
VLMO = ("model.norm=per_modality", "model.positions=relative", "model.qkv_bias=qv", "model.text_embed_norm=true")


@pytest.mark.parametrize("switches", [BEIT3, VLMO])
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


def test_options_that_are_not_built_are_refused() -> None:
    check_options("onnx", None, None)
    check_options("onnx", "float32", None)
    with pytest.raises(UsageError, match="--quantize int8 is not built for --format onnx"):
        check_options("onnx", None, "int8")
    with pytest.raises(UsageError, match="--dtype bfloat16 is not built for --format torch-export"):
        check_options("torch-export", "bfloat16", None)
