"""Teachers from transformers against direct calls of transformers, with tiny random models written to a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hub.fake_hub import FakeHub
from tests.model.support import config_of, randomise
from vlmoe_core.errors import HubError, TokenizerError, UsageError
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.teachers import transformers_model
from vlmoe_core.tokenizers.teachers.transformers_model import TransformersTeacher

transformers: Any = pytest.importorskip("transformers")

MEAN, DEVIATION = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
GRID = 4
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def written(model: Any, folder: Path) -> Path:
    """The model's folder, with the settings of its image processor."""
    torch.manual_seed(0)
    randomise(model)
    model.save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": DEVIATION, "rescale_factor": 1 / 255, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def teacher_of(name: str, dim: int = 24, grid: int = GRID) -> TransformersTeacher:
    """The teacher of an encoder with other patches, but as many."""
    return TransformersTeacher(TeacherConfig(model=name, dim=dim), config_of(patch_size=8, image_size=8 * grid))


def clip() -> Any:
    config = transformers.CLIPConfig(vision_config=SMALL, text_config=TEXT, projection_dim=12)
    return transformers.CLIPModel(config).eval()


def clip_vision() -> Any:
    config = transformers.CLIPVisionConfig(**SMALL, projection_dim=12)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def vit(**values: Any) -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**{**SMALL, **values}), add_pooling_layer=False).eval()


def beit() -> Any:
    config = transformers.BeitConfig(**SMALL, use_mean_pooling=False, use_relative_position_bias=True)
    return transformers.BeitModel(config, add_pooling_layer=False).eval()


def dinov2() -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)).eval()


def registers() -> Any:
    config = transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(config).eval()


def siglip() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)).eval()


def pixels(size: int = 16, images: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)


def normalised(pixels_ICHW: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels_ICHW / 255 - mean) / deviation


@torch.no_grad()
def states(model: Any, pixels_ICHW: Tensor) -> Tensor:
    found: Tensor = model(pixel_values=normalised(pixels_ICHW)).last_hidden_state
    return found


@pytest.mark.parametrize(
    ("build", "leading"), [(vit, 1), (beit, 1), (dinov2, 1), (registers, 4), (siglip, 0)], ids=lambda v: str(v)[:18]
)
def test_the_last_states_of_the_patches(build: Callable[[], Any], leading: int, tmp_path: Path) -> None:
    theirs = build()
    teacher = teacher_of(str(written(theirs, tmp_path)))
    found = teacher.features(pixels())
    wanted = states(theirs, pixels())
    assert wanted.shape == (3, leading + 16, 24) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, wanted[:, leading:])


@pytest.mark.parametrize("build", [clip, clip_vision])
def test_clip_projects_every_patch_as_it_does_its_cls(build: Callable[[], Any], tmp_path: Path) -> None:
    """The targets of BEiT v2: the last norm and the projection, of each patch."""
    theirs = build()
    teacher = teacher_of(str(written(theirs, tmp_path)), 12)
    with torch.no_grad():
        out = theirs.vision_model(pixel_values=normalised(pixels()))
        wanted = theirs.visual_projection(theirs.vision_model.post_layernorm(out.last_hidden_state))
        cls = theirs.visual_projection(out.pooler_output)
    torch.testing.assert_close(wanted[:, 0], cls)
    torch.testing.assert_close(teacher.features(pixels()), wanted[:, 1:])


@pytest.mark.parametrize("size", [16, 32])
def test_no_images_have_no_features(size: int, tmp_path: Path) -> None:
    """As on a rank whose examples are all broken, or whose share of the held-out ones is empty."""
    found = teacher_of(str(written(vit(), tmp_path))).features(pixels(size, images=0))
    assert found.shape == (0, 16, 24) and found.dtype == torch.float32


def test_images_of_another_size_are_resized(tmp_path: Path) -> None:
    theirs = vit()
    teacher = teacher_of(str(written(theirs, tmp_path)))
    for size in (8, 64):
        small = F.interpolate(pixels(size).float(), (16, 16), mode="bicubic", antialias=True).clamp(0, 255)
        assert (small > 0).any() and small.max() <= 255
        torch.testing.assert_close(teacher.features(pixels(size)), states(theirs, small)[:, 1:])


def test_it_stays_frozen_and_outside_of_what_holds_it(tmp_path: Path) -> None:
    theirs = vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learns = nn.Linear(24, 24)
            self.teacher = teacher_of(str(written(theirs, tmp_path)))

    objective = Objective()
    objective.teacher.load()
    objective.train()
    with torch.autocast("cpu", torch.bfloat16):
        target = objective.teacher.features(pixels())
    torch.testing.assert_close(target, states(theirs, pixels())[:, 1:])
    (objective.learns(target) - target).square().mean().backward()
    assert (
        set(objective.state_dict()) == {"learns.weight", "learns.bias"} == {n for n, _ in objective.named_parameters()}
    )
    model = objective.teacher._loaded()
    assert all(not p.requires_grad and p.grad is None for p in model.parameters()) and not model.training


def test_weights_are_read_once_and_at_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    read = transformers_model._read_model

    def counted(name: str, folder: Path, config: Any) -> nn.Module:
        calls.append(name)
        return read(name, folder, config)

    monkeypatch.setattr(transformers_model, "_read_model", counted)
    teacher = teacher_of(str(written(vit(), tmp_path)))
    assert calls == []
    teacher.features(pixels())
    teacher.load()
    assert len(calls) == 1


def test_a_load_draws_nothing_from_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file without a pooler makes transformers draw one, which nobody uses."""
    teacher = teacher_of(str(written(vit(), tmp_path)))
    capfd.readouterr()
    torch.manual_seed(7)
    teacher.load()
    found = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(1))
    assert capfd.readouterr() == ("", "")


def test_from_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = dinov2()
    folder = written(theirs, tmp_path / "model")
    hub.store.make("org/teacher", **{path.name: path.read_bytes() for path in folder.iterdir()})
    wanted = states(theirs, pixels())[:, 1:]
    for name in ("org/teacher", "hf-hub:org/teacher@main"):
        torch.testing.assert_close(teacher_of(name).features(pixels()), wanted)
    with pytest.raises(
        HubError, match=r"teacher org/gone is no folder here, and hf-hub:org/gone can't be fetched: the"
    ):
        teacher_of("org/gone").load()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set and the cache does not have it; .*the path of a copy"):
        teacher_of("org/other").load()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_model, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"teacher org/x needs the package transformers: pip install 'vlmoe\[teachers\]'"
    ):
        teacher_of("org/x").load()


@pytest.mark.parametrize(
    ("dim", "grid", "message"),
    [
        (24, 7, r"has 4 x 4 patches \(image 16, patch 4\), the model 7 x 7; set the model's image_size to 4 times"),
        (32, GRID, "has features 24 wide, not 32; set dim to 24"),
    ],
)
def test_what_does_not_fit_is_said_with_both_values(dim: int, grid: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        teacher_of(str(written(vit(), tmp_path)), dim, grid).load()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def incomplete(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["embeddings.cls_token"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def misshapen(folder: Path) -> None:
    change("config.json", hidden_size=12)(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        settings = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(settings))

    return changed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"can't be loaded \(.*\); fetch it again"),
        (incomplete, r"lacks 1 of its weights, embeddings\.cls_token first"),
        (misshapen, r"can't be loaded \(.*\); fetch it again"),
        (pickled, r"holds no model\.safetensors, the only weights that are read"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json: it is no model of transformers"),
        (lambda folder: (folder / "config.json").write_text("{"), r"has no config\.json that can be used \("),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), r"config\.json can't be read \("),
        (change("config.json", patch_size=[4, 2]), r"is no vision model of square patches"),
        (change("config.json", model_type="unheard_of"), r"has no config\.json that can be used \(.*unheard_of"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            r"no preprocessor_config\.json says image_mean",
        ),
        (change("preprocessor_config.json", image_std=[0.1, 0, 0.1]), "three numbers each, of pixels from 0 to 1"),
        (change("preprocessor_config.json", do_normalize=False), "three numbers each, of pixels from 0 to 1"),
    ],
)
def test_what_is_damaged_is_one_message(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = written(vit(), tmp_path)
    spoil(folder)
    with pytest.raises(TokenizerError, match=message):
        teacher_of(str(folder)).load()


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = written(vit(), tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    change("config.json", model_type="evil", auto_map=names)(folder)
    with pytest.raises(TokenizerError, match=r"has no config\.json that can be used"):
        teacher_of(str(folder)).load()
    assert not (tmp_path / "ran").exists()


def test_sizes_that_a_folder_leaves_out_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {}, "text_config": {}}))
    with pytest.raises(TokenizerError, match=r"has 14 x 14 patches \(image 224, patch 16\), the model 7 x 7"):
        teacher_of(str(tmp_path), grid=7).load()


def test_a_model_of_words_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.BertConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=r"\(bert\) is no vision model of square patches: image_size None"):
        teacher_of(str(tmp_path)).load()


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "model", "a/b/c", ""])
def test_a_folder_that_is_absent(name: str) -> None:
    with pytest.raises(TokenizerError, match=r"is no folder; give one that transformers wrote, or a Hub name ORG/NAME"):
        teacher_of(name).load()


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**{**SMALL, **TEXT})).eval()


def vilt() -> Any:
    return transformers.ViltModel(transformers.ViltConfig(**SMALL, vocab_size=20)).eval()


def swin() -> Any:
    sizes = {"image_size": 16, "patch_size": 4, "window_size": 2, "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 2]}
    return transformers.SwinModel(transformers.SwinConfig(**sizes)).eval()


def videomae() -> Any:
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**SMALL)).eval()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bert, r"\(bert\) is no vision model: it reads no images alone"),
        (vilt, r"\(vilt\) is no vision model: it reads no images alone"),
        (swin, r"gives states of shape \(1, 4, 12\), not one for each of 4 x 4 patches"),
        (videomae, r"does not take an image \("),
    ],
)
def test_other_kinds_of_models_are_refused(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        teacher_of(str(written(build(), tmp_path))).load()
