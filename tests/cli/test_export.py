"""`vlmoe export` as it is typed."""

import json
from pathlib import Path

import pytest

from tests.cli.tasks_support import vlmoe
from tests.hub.fake_hub import FakeHub
from vlmoe_core.data.config import SplitConfig
from vlmoe_core.hub.export.formats import Check, Safetensors
from vlmoe_core.hub.export.native import NativeOptions, write_native
from vlmoe_core.train.trained import load_trained

EXPORT = ("export", "--format")


def receipt(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "export.json").read_text())
    return found


def test_a_model_folder_answers_as_its_run(work: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "model")
    done = vlmoe(work, *EXPORT, "safetensors", "--model", "runs/nli", "--out", out)
    assert done.code == 0, done.err
    assert "examples in a fresh process: the same bit by bit" in done.out
    ours, theirs = (vlmoe(work, "eval", "nli", "--model", model, "--json").data for model in (out, "runs/nli"))
    assert ours["metrics"] == theirs["metrics"] and ours["n"] == theirs["n"]
    assert (tmp_path / "model" / "README.md").read_text().startswith("---\n")
    found = receipt(tmp_path / "model")
    assert found["source"] == "nli/checkpoints/step-00000004" and str(work) not in json.dumps(found)
    done = vlmoe(work, *EXPORT, "safetensors", "--model", "runs/nli", "--out", out)
    assert done.code == 2 and "not empty" in done.message


def test_int8_says_what_it_cost(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    options = ("--model", "runs/vqa", "--quantize", "int8", "--max-shard-size", "10KB", "--out", str(out), "--json")
    found = vlmoe(work, *EXPORT, "safetensors", *options).data
    assert (
        found["check"]["identical"]
        and 0.1 < found["quantised"]["values_quantised"] < found["quantised"]["values_total"]
    )
    assert found["metric_before"]["name"] == found["metric_after"]["name"] == "accuracy"
    scored = vlmoe(work, "eval", "vqa", "--model", str(out), "--json").data
    assert scored["metrics"]["accuracy"] == found["metric_after"]["value"]
    assert len(list(out.glob("model-*.safetensors"))) > 3
    trained = vlmoe(work, "finetune", "nli.yaml", "--model", str(out), "--out", str(tmp_path / "run"))
    assert trained.code == 0, trained.err


def test_a_task_sized_graph(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    words = ("--modality", "text", "--experts", "used:0.5", "--removed", "drop", "--out", str(tmp_path / "graph"))
    found = vlmoe(work, *EXPORT, "onnx", "--model", "runs/nli", *words, "--json").data
    assert found["check"]["flipped_share"] <= 1e-4 and found["check"]["max_difference"] <= 1e-4
    assert found["after"]["parameters"] < found["before"]["parameters"]
    assert (tmp_path / "graph" / "model-text.onnx").exists()


def test_before_and_after_are_measured_on_what_the_export_takes(work: Path, tmp_path: Path) -> None:
    """The whole pretrained model on pictures alone is what its vision path is: nothing of it changed."""
    words = ("--model", "runs/base", "--modality", "vision", "--out", str(tmp_path / "vision"), "--json")
    found = vlmoe(work, *EXPORT, "safetensors", *words).data
    before, after = found["metric_before"], found["metric_after"]
    assert before["examples"] == after["examples"] and after["value"] > 0
    assert before["value"] == pytest.approx(after["value"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("onxx",), "--format onxx: did you mean 'onnx'?"),
        (("onnx", "--dtype", "bf16"), "--dtype bf16 is built for --format safetensors"),
        (("transformers", "--quantize", "int8"), "--quantize int8 is built for --format safetensors"),
        (("safetensors", "--quantize", "int4"), "--quantize int4: did you mean 'int8'?"),
        (("safetensors", "--dtype", "bf16", "--quantize", "int8"), "exclude each other"),
        (("safetensors", "--max-shard-size", "big"), "give a size such as 500MB"),
        (("safetensors", "--max-shard-size", "0MB"), "give a size such as 500MB"),
        (("safetensors", "--experts", "best"), "give used:SHARE"),
        (("safetensors", "--experts", "used:2"), "above 0 and at most 1"),
        (("safetensors", "--modality", "audio"), "--modality audio"),
        (("safetensors", "--modality", "vision"), "it needs more paths"),
        (("safetensors", "--removed", "keep"), "--removed keep"),
        (("safetensors", "--removed", "drop"), "give --experts with it"),
        (("onnx", "--max-shard-size", "1GB"), "--max-shard-size is for safetensors and transformers"),
        (("transformers", "--no-visual-tokenizer"), "transformers never holds one"),
    ],
)
def test_words_that_are_none(work: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = vlmoe(work, *EXPORT, *words, "--model", "runs/nli", "--out", str(tmp_path / "out"))
    assert done.code == 2 and message in done.message
    assert not (tmp_path / "out").exists()


def test_what_answers_otherwise_is_not_kept(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Safetensors, "check", lambda *_: Check(samples=3, identical=False, max_difference=1e-9))
    done = vlmoe(work, *EXPORT, "safetensors", "--model", "runs/nli", "--out", str(tmp_path / "out"))
    assert done.code == 1 and "does not answer as the model does, so it was not kept" in done.message
    assert list(tmp_path.iterdir()) == []


def test_an_export_goes_to_the_hub_with_its_card(hub: FakeHub, work: Path, tmp_path: Path) -> None:
    words = ("--model", "runs/nli", "--out", str(tmp_path / "out"), "--push-to", "org/nli")
    done = vlmoe(work, *EXPORT, "transformers", *words)
    assert done.code == 0, done.err
    files = hub.store.repos["org/nli"].files()
    assert {"config.json", "modeling_vlmoe.py", "model.safetensors", "export.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert 'from_pretrained("org/nli"' in card and "ORG/NAME" not in card


def test_other_data_serve_where_the_models_own_are_not(work: Path, tmp_path: Path) -> None:
    """A model from elsewhere: its recipe names files that are not here."""
    recipe = (work / "nli.yaml").read_text()
    (tmp_path / "away.yaml").write_text(recipe)
    out = str(tmp_path / "model")
    assert vlmoe(work, *EXPORT, "safetensors", "--model", "runs/nli", "--out", out).code == 0
    elsewhere = load_trained(Path(out))
    away = {"train": {"text": [{"source": "nli", "path": "gone.jsonl"}]}, "eval": {}}
    data = elsewhere.recipe.data.model_copy(update={k: SplitConfig.model_validate(v) for k, v in away.items()})
    moved = elsewhere.recipe.model_copy(update={"data": data})
    write_native(moved, elsewhere.tokenizers, elsewhere.objective, 4, tmp_path / "moved", NativeOptions())
    words = ("--model", str(tmp_path / "moved"), "--dtype", "bf16", "--out", str(tmp_path / "out"))
    assert vlmoe(work, *EXPORT, "safetensors", *words).code == 1
    found = vlmoe(work, *EXPORT, "safetensors", *words, "--data", "nli.yaml", "--json").data
    assert found["check"]["identical"] and found["metric_after"]["examples"] > 0
    assert found["options"]["data"] == "nli.yaml"
    assert load_trained(tmp_path / "out").recipe.data == data, "the recipe stays the model's own"
