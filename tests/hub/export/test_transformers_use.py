"""What a user without the package does with an exported repository (stranger.py, in one process for all tests)."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.hub.export.transformers_support import trained_of
from tests.model.support import collate_of, samples_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.hub.export.transformers.export import export_transformers
from vlmoe_core.train.trained import Trained

LENGTHS = [1, 24, 5]
"""One token, the longest text, and one between."""
SMALL = 20_000
STRANGER = Path(__file__).with_name("stranger.py")


def tamper(folder: Path) -> None:
    """Copies of the nli repository that a newer version, or nobody in good faith, has written."""
    changes = {
        "field": ("config.json", b'"qkv_bias"', b'"qkv_colour"'),
        "router": ("config.json", b'"name": "softmax"', b'"name": "quantum"'),
        "header": ("model.safetensors", b'"F32"', b'"F64"'),
    }
    for name, (file, before, after) in changes.items():
        shutil.copytree(folder / "nli", folder / name)
        data = (folder / name / file).read_bytes()
        assert before in data
        (folder / name / file).write_bytes(data.replace(before, after, 1))


@dataclass(frozen=True)
class Found:
    folder: Path
    models: dict[str, Trained]
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def padded(samples: list[Sample]) -> dict[str, Tensor]:
    """The arguments of a model for samples in which words and patches are hidden."""
    ids = torch.full((len(samples), max(LENGTHS)), 49)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        assert sample.text_ids is not None
        ids[row, : len(sample.text_ids)] = torch.from_numpy(sample.text_ids)
        mask[row, : len(sample.text_ids)] = 1
    pixels = torch.stack([torch.from_numpy(s.pixels) for s in samples])
    hidden = torch.stack([torch.from_numpy(s.patch_mask) for s in samples])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "bool_masked_pos": hidden}


def batch_of(trained: Trained, stream: StreamName) -> Batch:
    """The same samples as the package has them."""
    config = trained.recipe.model
    samples = samples_of("pair", LENGTHS, config)
    if stream == "image":
        samples = [Sample(s.name, s.position, s.image_id, s.pixels, s.patch_mask) for s in samples]
    if stream == "text":
        samples = [Sample(s.name, s.position, text_ids=s.text_ids, text_targets=s.text_targets) for s in samples]
    return collate_of(stream, samples, config)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("stranger")
    models = {
        "masked": trained_of(folder / "runs" / "masked", "masked", "model.moe.vision.top_k=2"),
        "tied": trained_of(folder / "runs" / "tied", "masked"),
        "classification": trained_of(folder / "runs" / "classification", "classification"),
        "nli": trained_of(folder / "runs" / "nli", "nli"),
        "vqa": trained_of(folder / "runs" / "vqa", "vqa"),
        "nlvr2": trained_of(folder / "runs" / "nlvr2", "nlvr2"),
        "retrieval": trained_of(folder / "runs" / "retrieval", "retrieval", "task.itm_weight=0"),
    }
    objective: Any = models["tied"].objective
    objective.heads.text.weight = objective.encoder.embeddings.text.word.weight
    for name, trained in models.items():
        export_transformers(trained, folder / name, SMALL if name in ("masked", "tied") else 2**30)
    save_file(padded(samples_of("pair", LENGTHS, models["masked"].recipe.model)), folder / "inputs.safetensors")
    Image.new("RGB", (20, 12), "red").save(folder / "picture.png")
    tamper(folder)
    done = subprocess.run(
        [sys.executable, "-I", str(STRANGER), str(folder)],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Found(folder, models, json.loads(done.stdout.splitlines()[-1]), load_file(folder / "found.safetensors"))


@pytest.mark.parametrize("stream", ["pair", "image", "text"])
def test_hidden_words_and_patches_are_predicted_as_by_the_package(found: Found, stream: StreamName) -> None:
    trained = found.models["masked"]
    objective: Any = trained.objective
    with torch.no_grad():
        words, patches = objective.predict(batch_of(trained, stream))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    if stream != "image":
        got = found.tensors[f"{stream}.logits"]
        assert torch.equal(got[mask], words)
        assert (got[~mask] == 0).all()
    if stream != "text":
        assert torch.equal(found.tensors[f"{stream}.patch_logits"], patches)
    if stream == "text":
        assert torch.equal(found.tensors["left.logits"], words)


@pytest.mark.parametrize("stream", ["pair", "text"])
def test_the_encoder_alone_gives_its_final_states(found: Found, stream: StreamName) -> None:
    trained = found.models["masked"]
    objective: Any = trained.objective
    with torch.no_grad():
        encoded = objective.encoder(batch_of(trained, stream))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    states = found.tensors[f"encoder.{stream}.last_hidden_state"]
    tokens = 17 if stream == "pair" else 0
    assert states.shape == (3, tokens + 24, 16)
    assert torch.equal(states[:, tokens:][mask], encoded.text_states_TD)
    pooled = found.tensors[f"encoder.{stream}.pooler_output"]
    assert torch.equal(pooled, encoded.image_cls_ID if stream == "pair" else encoded.text_cls_SD)
    if stream == "pair":
        assert torch.equal(states[:, :tokens], encoded.image_states_IND)
    assert found.facts["encoder"] == "VLMoEModel"


def test_what_transformers_saves_answers_the_same(found: Found) -> None:
    assert found.facts["same state"]
    for name in ("logits", "patch_logits"):
        assert torch.equal(found.tensors[f"again.{name}"], found.tensors[f"pair.{name}"])
    code = {path.name for path in (found.folder / "masked").glob("*.py") if not path.name.startswith("processing")}
    again = {path.name for path in (found.folder / "again").glob("*.py")}
    assert {"modeling_vlmoe.py", "configuration_vlmoe.py", "vlmoe_moe_implementations_loop.py"} <= again <= code
    assert len(list((found.folder / "again").glob("*.safetensors"))) > 2


def test_shards_are_small_and_hold_every_tensor_once(found: Found) -> None:
    state = found.models["masked"].objective.state_dict()
    files = sorted((found.folder / "masked").glob("*.safetensors"))
    assert len(files) > 3
    held = [(name, tensor) for path in files for name, tensor in load_file(path).items()]
    assert sorted(name for name, _ in held) == sorted(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in held)
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= SMALL


def test_tied_weights_stay_one_tensor(found: Found) -> None:
    assert found.facts["tied"] == [True, True]
    assert found.facts["encoder of tied"] == "VLMoEModel"
    index = json.loads((found.folder / "tied" / "model.safetensors.index.json").read_text())
    assert "heads.text.weight" not in index["weight_map"]
    trained = found.models["tied"]
    objective: Any = trained.objective
    with torch.no_grad():
        words, patches = objective.predict(batch_of(trained, "pair"))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    for name in ("tied", "tied again"):
        assert torch.equal(found.tensors[f"{name}.logits"][mask], words)
        assert torch.equal(found.tensors[f"{name}.patch_logits"], patches)


def test_labels_give_the_loss(found: Found) -> None:
    assert found.facts["loss"] == pytest.approx(0, abs=1e-6)
    assert found.facts["vqa loss"] == pytest.approx(0, abs=1e-5)


def test_what_does_not_fit_is_told(found: Found) -> None:
    nothing, floats, size, fewer, longer, empty = found.facts["complaints"]
    assert "give input_ids, pixel_values or both" in nothing
    assert "uint8" in floats and "float32" in floats
    assert "(3, 16, 16)" in size and "(3, 16, 8)" in size
    assert "2 images came with 3 texts" in fewer
    assert "25 tokens" in longer and "24" in longer
    assert "without any token" in empty
    assert "2 images of each example" in found.facts["one picture"]
    assert "trained without matching" in found.facts["unmatched"]


def test_unknown_parts_and_a_header_that_lies_are_refused_by_name(found: Found) -> None:
    field, router, header = found.facts["tampered"]
    assert "ModelConfig knows no qkv_colour: the config is of a newer version" in field
    assert "routers.quantum is not part of this repository" in router
    assert header.startswith("SafetensorError")


def test_images_are_compared_with_texts(found: Found) -> None:
    tensors = found.tensors
    cosines = tensors["retrieval.image_embeds"] @ tensors["retrieval.text_embeds"].T
    objective: Any = found.models["retrieval"].objective
    torch.testing.assert_close(tensors["retrieval.logits_per_image"], objective.contrast.scale.detach() * cosines)
    assert torch.equal(tensors["retrieval.logits_per_text"], tensors["retrieval.logits_per_image"].T)


def test_a_classifier_serves_pipelines_and_new_labels(found: Found) -> None:
    facts, names = found.facts, found.models["classification"].tokenizers.labels.names
    assert facts["labels"] == {str(number): name for number, name in enumerate(names)}
    assert set(facts["pipeline"]) <= set(names) and len(facts["pipeline"]) == 2
    assert facts["kept"]
    shape, std, bias = facts["fewer"]
    assert shape == [3, 16]
    assert std == pytest.approx(0.02, rel=0.4)
    assert bias == 0
    assert facts["pixels"] == [[1, 3, 16, 16], "torch.uint8"]


def test_a_model_from_its_config_begins_as_the_package_begins(found: Found) -> None:
    # The output maps of block l are divided by sqrt(2 l).
    first, second = found.facts["fresh"]
    assert first == pytest.approx(0.02 / 2**0.5, rel=0.15)
    assert second == pytest.approx(0.02 / 4**0.5, rel=0.15)


def test_texts_get_the_tokens_of_the_package(found: Found) -> None:
    text = found.models["nli"].tokenizers.text
    words, facts = "a red [MASK] is big", found.facts
    assert facts["pair"] == facts["types"] == [True]
    assert facts["plain"] == [text.cls_id, *text.encode(words), text.sep_id]
    assert facts["masked"] == [text.cls_id, *text.encode_masked(words), text.sep_id]
    assert text.mask_id in facts["masked"] and text.mask_id not in facts["plain"]
    assert facts["batch"][0] == min(24, 3 + len(text.encode(words)) + len(text.encode("the [CLS] circle")))


def test_nothing_of_the_package_pydantic_or_torchvision_is_needed(found: Found) -> None:
    assert found.facts["imported"] == []
