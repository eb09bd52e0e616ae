"""Exported repositories answer bit for bit as the package, in a process that can import neither it nor pydantic."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.hub.export.transformers_support import examples_of, trained_of
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Example
from vlmoe_core.errors import HubError, UsageError
from vlmoe_core.hub.export.samples import batch_of
from vlmoe_core.hub.export.transformers import compare as comparison
from vlmoe_core.hub.export.transformers.compare import Asked, ask_fresh, compare_transformers, native_answers
from vlmoe_core.hub.export.transformers.export import export_transformers
from vlmoe_core.hub.export.transformers.settings import ARCHITECTURES
from vlmoe_core.moe.experts import Experts
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.train.trained import Trained

VISION, TEXT = "model.moe.vision", "model.moe.text"
DENSE = (f"{VISION}=null", f"{TEXT}=null")
TWO = (f"{VISION}.top_k=2", f"{TEXT}.top_k=3")
FULL = (f"{VISION}.eval_capacity_factor=0.001", f"{TEXT}.eval_capacity_factor=0.001")
"""One place an expert: nearly every token is dropped."""
BEIT3 = (
    "model.attention=per_modality",
    "model.norm=per_modality",
    "model.sub_norm=true",
    f"{VISION}.experts=loop",
    f"{TEXT}.experts=loop",
    "model.positions=relative",
    "model.text_embed_norm=true",
)
OTHERS = ("model.qkv_bias=qv", "model.layer_scale=0.1", "model.patch_embed=conv", "model.positions=relative_shared")
POOL = "{shared: {num_experts: 4, layers: [0], top_k: 2, router: bias-balanced}}"

CASES: Mapping[str, tuple[str, ...]] = {
    "vqa": ("vqa", "data.max_text.pair=8"),
    "vqa dense": ("vqa", *DENSE),
    "vqa full": ("vqa", *FULL, *TWO, "task.pool=means"),
    "vqa bfloat16": ("vqa", *TWO),
    "nlvr2": ("nlvr2", *TWO),
    "nlvr2 dense": ("nlvr2", *DENSE),
    "retrieval": ("retrieval", *TWO, "data.max_text.pair=9"),
    "retrieval contrast": ("retrieval", *DENSE, "task.itm_weight=0"),
    "classification": ("classification", f"{VISION}.router=cosine", f"{VISION}.shared_expert=true"),
    "classification full": ("classification", *FULL, "task.pool=image"),
    "classification dense": ("classification", *DENSE),
    "classification vision": ("classification", f"{TEXT}=null", "model.modality=vision", "model.vl_layers=0"),
    "nli text": ("nli", f"{VISION}=null", "model.modality=text", "model.vl_layers=0"),
    "nli kept": ("nli", f"{TEXT}.kept_experts={{0: [1, 3]}}", f"{TEXT}.removed=drop"),
    "nli none": ("nli", f"{TEXT}.kept_experts={{0: [2, 3]}}", f"{TEXT}.removed=drop", f"{TEXT}.top_k=2"),
    "vqa kept": ("vqa", f"{VISION}.kept_experts={{0: [0, 2, 3]}}", f"{TEXT}.top_k=2"),
    "nli": ("nli", "data.max_text.text=9", "task.pool=sentences", f"{TEXT}.router=hash"),
    "nli full": ("nli", *FULL, f"{TEXT}.weights=renormalised", f"{TEXT}.top_k=2"),
    "nli dense": ("nli", *DENSE),
    "masked": ("masked", "data.pad_text_to=12"),
    "masked dense": ("masked", *DENSE),
    "masked two": ("masked", *TWO, *OTHERS),
    "masked beit3": ("masked", *BEIT3, "objective.weights={itc: 1.0}"),
    "masked shared": ("masked", "model.expert_pool=shared", f"model.moe={POOL}"),
}


@dataclass(frozen=True)
class Answered:
    asked: Asked
    got: Mapping[str, Tensor]


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def odd_pictures() -> list[bytes]:
    """A photograph that lies on its side, transparency, 16 bits, a palette, one bright line."""
    torch.manual_seed(0)
    noise = Image.fromarray(torch.randint(0, 256, (23, 41, 3), dtype=torch.uint8).numpy())
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(torch.randint(0, 65536, (9, 30)).to(torch.uint16).numpy())
    see_through = noise.copy()
    see_through.putalpha(90)
    return [
        encoded(noise, "JPEG", exif=turned),
        encoded(see_through, "PNG"),
        encoded(grey, "PNG"),
        encoded(noise.convert("P"), "GIF"),
        encoded(noise.resize((200, 1)), "PNG"),
        encoded(noise, "WEBP"),
    ]


def samples_of(trained: Trained) -> dict[StreamName, list[Example]]:
    """Scenes; a classifier gets odd files as well, a first text that is long, and a text of one word."""
    samples = examples_of(trained)
    if "image" in samples:
        samples["image"] += [replace(samples["image"][0], image=data) for data in odd_pictures()]
    for stream in ("text", "pair"):
        if stream in samples:
            first = samples[stream][0]
            samples[stream][0] = replace(first, text=f"{first.text} " * 20)
            samples[stream][1] = replace(samples[stream][1], text="red")
    return samples


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Answered]:
    """What every case says, from one process."""
    folder, asked = tmp_path_factory.mktemp("transformers"), {}
    for name, (task, *overrides) in CASES.items():
        trained = trained_of(folder / "runs" / name, task, *overrides)
        trained.objective.to(torch.bfloat16 if "bfloat16" in name else torch.float32)
        if name == "nli none":
            _drop_all(trained)
        place = folder / name.replace(" ", "_")
        export_transformers(trained, place, 20_000)
        asked |= {(name, s): Asked(trained, place, s, own) for s, own in samples_of(trained).items()}
    found = ask_fresh(list(asked.values()))
    return {key: Answered(one, got) for (key, one), got in zip(asked.items(), found, strict=True)}


def _drop_all(trained: Trained) -> None:
    """Equal gates: every token chooses the first experts, which were removed."""
    for layer in trained.objective.modules():
        if isinstance(layer, SparseFFN):
            torch.nn.init.zeros_(layer.router.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_answers_are_bit_identical(case: str, answered: dict[tuple[str, str], Answered]) -> None:
    own = [one for (name, _), one in answered.items() if name == case]
    assert own
    for one in own:
        expected = native_answers(one.asked)
        assert expected.keys() <= one.got.keys()
        for name, tensor in expected.items():
            assert torch.equal(one.got[name].view(tensor.shape), tensor), name
            assert tensor.float().std() > 0


def test_every_task_and_pretraining_has_a_case() -> None:
    assert {task for task, *_ in CASES.values()} == ARCHITECTURES.keys()


def test_a_full_expert_drops_tokens_and_the_texts_are_cut(answered: dict[tuple[str, str], Answered]) -> None:
    full = answered["nli full", "text"].asked.trained.objective
    batches: list[Tensor] = []
    for module in full.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[1].kept_TK))
    native_answers(answered["nli full", "text"].asked)
    kept = torch.cat([kept_TK.flatten() for kept_TK in batches])
    assert 0 < kept.sum() <= 4 * len(batches) < len(kept) / 4
    ids = answered["nli", "text"].got["input_ids"]
    assert len(ids) <= 6 * 9


def test_every_token_can_be_dropped(answered: dict[tuple[str, str], Answered]) -> None:
    one = answered["nli none", "text"].asked
    encoder: Any = one.trained.objective.encoder
    [routed] = encoder(batch_of(one.trained, "text", one.examples)).routed
    assert not routed.plan.kept_TK.any()


def test_the_difference_of_other_weights_is_told(
    answered: dict[tuple[str, str], Answered], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = answered["classification dense", "image"]
    monkeypatch.setattr(comparison, "ask_fresh", lambda asked: [one.got])
    trained, samples = one.asked.trained, {one.asked.stream: one.asked.examples}
    same = compare_transformers(trained, one.asked.folder, samples)
    assert same == {"max_difference": 0.0, "identical": True, "samples": 12}
    head: Any = trained.objective.head
    with torch.no_grad():
        head.bias[1] += 0.25
        told = compare_transformers(trained, one.asked.folder, samples)
        head.bias[1] -= 0.25
    assert told == {"max_difference": pytest.approx(0.25, abs=1e-6), "identical": False, "samples": 12}


def test_a_repository_that_can_not_be_loaded_is_told(tmp_path: Path) -> None:
    trained = trained_of(tmp_path / "run", "classification")
    export_transformers(trained, tmp_path / "out")
    (tmp_path / "out" / "processing_vlmoe.py").unlink()
    with pytest.raises(HubError, match=r"can't load the exported repository: .*processing_vlmoe"):
        compare_transformers(trained, tmp_path / "out", examples_of(trained, 1))


def test_config_holds_what_was_resolved_and_no_path(tmp_path: Path) -> None:
    trained = trained_of(tmp_path / "run", "vqa", f"{VISION}.experts=tutel")
    export_transformers(trained, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["encoder"]["moe"]["vision"]["experts"] == "loop"
    assert config["encoder"]["norm_eps"] == trained.recipe.model.norm_eps
    assert config["id2label"]["0"] == trained.tokenizers.labels.names[0]
    assert config["auto_map"]["AutoModel"] == "modeling_vlmoe.VLMoEModel"
    assert config["dtype"] == "float32"
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{VISION}={{num_experts: 2, router: random}}",), "draws experts anew"),
        ((f"{VISION}.priority=random", f"{VISION}.eval_capacity_factor=1.0"), "the priority 'random'"),
    ],
)
def test_what_answers_otherwise_at_every_call_is_refused(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    trained = trained_of(tmp_path / "run", "classification", *overrides)
    with pytest.raises(UsageError, match=message):
        export_transformers(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_of(tmp_path / "run", "classification")
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -c constraints.txt -e '.\[export\]'"):
        compare_transformers(trained, tmp_path, examples_of(trained, 1))


def test_a_folder_that_holds_files_is_refused(tmp_path: Path) -> None:
    trained = trained_of(tmp_path / "run", "classification")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export_transformers(trained, tmp_path / "out")
