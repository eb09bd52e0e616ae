"""The export to a model folder: what its check sees, and what is refused when it is opened."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub.export.transformers_support import trained_of
from vlmoe_core.checkpoint.manifest import write_manifest
from vlmoe_core.checkpoint.stored import StoredTensors
from vlmoe_core.errors import CheckpointError, DataError, RecipeError, UsageError
from vlmoe_core.hub.export.formats import FORMATS, Safetensors, WriteOptions
from vlmoe_core.hub.export.native import NativeOptions, write_native
from vlmoe_core.hub.export.quantise import quantise
from vlmoe_core.hub.export.run import ExportRequest, export
from vlmoe_core.hub.export.samples import samples_of
from vlmoe_core.hub.export.shrink import Cut
from vlmoe_core.hub.model import VLMoE
from vlmoe_core.train.trained import Trained, load_trained

INT8, BF16 = WriteOptions(int8=True), WriteOptions(dtype="bf16")
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_of(tmp_path_factory.mktemp("nli"), "nli")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_of(tmp_path_factory.mktemp("masked"), "masked")


def with_data(trained: Trained, **splits: Any) -> Trained:
    data = trained.recipe.data.model_copy(update=splits)
    return replace(trained, recipe=trained.recipe.model_copy(update={"data": data}))


@pytest.mark.parametrize("options", [INT8, BF16])
def test_files_of_other_weights_are_seen(nli: Trained, tmp_path: Path, options: WriteOptions) -> None:
    """The files are compared with weights that were not read from them."""
    kind, samples = Safetensors(), samples_of(nli, 3)
    written = kind.write(nli, tmp_path / "model", options)
    if options == BF16:  # of the others tests/cli/test_export.py sees it
        assert kind.check(written.trained, tmp_path / "model", samples).identical
    name = "encoder.blocks.0.ffn.text.experts.2.down." + ("weight_scale" if options.int8 else "bias")
    tensors = load_file(tmp_path / "model" / SHARD)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, tmp_path / "model" / SHARD, metadata={"format": "pt"})
    write_manifest(tmp_path / "model", int(time.time()), {})
    assert not kind.check(written.trained, tmp_path / "model", samples).identical


@pytest.mark.parametrize("options", [INT8, BF16])
def test_a_model_is_rounded_for_its_files_and_stays_as_it_is(
    nli: Trained, tmp_path: Path, options: WriteOptions
) -> None:
    before = {name: tensor.clone() for name, tensor in nli.objective.state_dict().items()}
    written = Safetensors().write(nli, tmp_path / "model", options)
    assert all(torch.equal(nli.objective.state_dict()[name], tensor) for name, tensor in before.items())
    loaded, rounded = load_trained(tmp_path / "model").objective.state_dict(), written.trained.objective.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in rounded.items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in rounded.items())
    routers = [name for name in before if ".router." in name]
    assert routers and all(torch.equal(before[name], loaded[name]) for name in routers)
    assert written.quantised == (quantise(before)[1] if options.int8 else None)


@pytest.mark.parametrize("options", [WriteOptions(), INT8, BF16])
def test_tied_weights_are_written_once_and_read_as_one(tmp_path: Path, options: WriteOptions) -> None:
    tied = trained_of(tmp_path, "masked")
    objective: Any = tied.objective
    objective.heads.text.weight = objective.encoder.embeddings.text.word.weight
    names = "encoder.embeddings.text.word.weight", "heads.text.weight"
    Safetensors().write(tied, tmp_path / "model", options)
    stored = StoredTensors(tmp_path / "model", "model")
    assert stored.tied == {names[1]: names[0]} and names[1] not in stored.infos
    assert torch.equal(stored[names[0]], stored[names[1]])


def test_a_router_that_draws_is_checked_with_the_same_draws(tmp_path: Path) -> None:
    trained = trained_of(tmp_path, "nli", "model.moe.text={num_experts: 4, layers: [0], router: random}")
    kind = Safetensors()
    kind.write(trained, tmp_path / "model", WriteOptions())
    torch.rand(7)
    assert kind.check(trained, tmp_path / "model", samples_of(trained, 3)).identical


def test_examples_are_held_out_or_those_of_training(masked: Trained) -> None:
    data = masked.recipe.data
    less = with_data(masked, eval=data.eval.model_copy(update={"pair": ()}))
    whole, found = samples_of(masked, 3), samples_of(less, 3)
    assert {name: len(examples) for name, examples in found.items()} == {"image": 3, "text": 3, "pair": 3}
    assert [e.text for e in found["text"]] == [e.text for e in whole["text"]]
    assert [e.text for e in found["pair"]] != [e.text for e in whole["pair"]]
    nothing = {"pair": ()}
    none = with_data(less, train=data.train.model_copy(update=nothing), eval=data.eval.model_copy(update=nothing))
    with pytest.raises(DataError, match=r"data\.eval\.pair and data\.train\.pair give none that can be read"):
        samples_of(none, 3)


@pytest.mark.parametrize("format", ["transformers", "onnx", "torch-export"])
def test_chance_is_refused_before_any_work(tmp_path: Path, format: Any) -> None:
    trained = trained_of(tmp_path, "nli", "model.moe.text={num_experts: 4, layers: [0], router: random}")
    said: list[str] = []
    with pytest.raises(UsageError, match=r"'random', which draws experts anew .* use --format safetensors"):
        export(trained, ExportRequest(format, tmp_path / "out", WriteOptions(), Cut("text")), said.append)
    assert said == [] and format in FORMATS


def test_a_folder_without_a_name_is_refused(nli: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--out \.: name a folder"):
        export(nli, ExportRequest("safetensors", Path(), WriteOptions(), Cut()), lambda said: None)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  layers: 2\n", "  layers: 2\n  colour: red\n", r"recipe\.yaml:\d+: model\.colour: unknown key"),
        ("router: {name: softmax}", "router: {name: quantum}", r"recipe\.yaml.*quantum"),
        ("attention: shared", "attention: quantum", r"recipe\.yaml.*quantum"),
        ("name: nli", "name: poetry", r"recipe\.yaml.*poetry"),
    ],
)
def test_a_recipe_that_names_unknown_parts(nli: Trained, tmp_path: Path, before: str, after: str, message: str) -> None:
    """With a manifest that vouches for it, as a newer version of vlmoe would write it."""
    folder = write_native(nli.recipe, nli.tokenizers, nli.objective, 1, tmp_path / "m", NativeOptions())
    text = (folder / "recipe.yaml").read_text()
    assert before in text, text
    (folder / "recipe.yaml").write_text(text.replace(before, after, 1))
    write_manifest(folder, int(time.time()), {})
    for opened in (load_trained, VLMoE.from_pretrained):
        with pytest.raises(RecipeError, match=message):
            opened(folder)


def test_a_header_that_lies(nli: Trained, tmp_path: Path) -> None:
    folder = write_native(nli.recipe, nli.tokenizers, nli.objective, 1, tmp_path / "m", NativeOptions())
    whole = (folder / SHARD).read_bytes()
    for lie, message in (
        (whole.replace(b'"F32"', b'"I32"'), r"is int32 \(.*\), the model wants float32"),
        (whole.replace(b'"F32"', b'"F64"', 1), "not a whole safetensors file"),
        (whole.replace(b'"shape":[3', b'"shape":[2', 1), "not a whole safetensors file"),
        (b"\xff" * 8 + whole[8:], "not a whole safetensors file"),
    ):
        assert lie != whole
        (folder / SHARD).write_bytes(lie)
        write_manifest(folder, int(time.time()), {})
        with pytest.raises(CheckpointError, match=message):
            VLMoE.from_pretrained(folder)


def test_a_fresh_process_finds_the_package_that_is_running(
    nli: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not another copy of it that lies in the working folder, or where PYTHONPATH leads."""
    for place in (tmp_path / "here", tmp_path / "there"):
        (place / "vlmoe_core").mkdir(parents=True)
        (place / "vlmoe_core" / "__init__.py").write_text("raise ImportError('another copy')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "there"))
    kind = Safetensors()
    written = kind.write(nli, tmp_path / "model", WriteOptions())
    assert kind.check(written.trained, tmp_path / "model", samples_of(nli, 2)).identical
