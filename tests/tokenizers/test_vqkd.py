import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tests.tokenizers.vqkd_support import encoder_of, pictures, random_tensors, random_tokenizer, shape_of
from vlmoe_core.errors import TokenizerError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.teachers.pixels import PixelTeacher
from vlmoe_core.tokenizers.visual import TENSOR_FILE, load_visual_tokenizer
from vlmoe_core.tokenizers.vqkd import VQKD, FeatureDecoder, check_shape, images_alone

CLIP = TeacherConfig(model="a-model", dim=7)


def test_a_token_is_the_nearest_code_of_a_patch() -> None:
    """Step by step: encoder, two linear maps with tanh, unit length, smallest distance; [CLS] has no token."""
    tokenizer = random_tokenizer()
    with torch.no_grad():
        states_IND = tokenizer.encoder(images_alone(pictures(), 16)).image_states_IND
        first, _, second = tokenizer.codes.project
        features = second(torch.tanh(first(states_IND[:, 1:])))
        features = features / features.norm(dim=-1, keepdim=True)
        distances = torch.cdist(features, tokenizer.codes.quantiser.codes_KF)
    ids_BN = tokenizer.encode(pictures())
    assert ids_BN.dtype == torch.int64
    assert torch.equal(ids_BN, distances.argmin(-1))
    assert len(ids_BN.unique()) > 5


def test_bytes_and_floats_are_the_same_picture() -> None:
    tokenizer = random_tokenizer()
    assert torch.equal(tokenizer.encode(pictures()), tokenizer.encode(pictures().float() / 255))


@pytest.mark.parametrize("size", [16, 32])
def test_no_pictures_have_no_tokens(size: int) -> None:
    assert random_tokenizer().encode(pictures(0, size)).shape == (0, 16)


def test_other_types_of_pixels_are_refused() -> None:
    with pytest.raises(TokenizerError, match=re.escape("pixels are torch.int64; give uint8, or floats in [0, 1]")):
        random_tokenizer().encode(pictures().long())


def test_pictures_of_another_size_are_resized() -> None:
    tokenizer = random_tokenizer()
    large = pictures(size=32)
    resized = F.interpolate(large.float(), size=(16, 16), mode="bicubic", antialias=True).clamp(0, 255)
    assert torch.equal(tokenizer.encode(large), tokenizer.encode(resized / 255))
    assert tokenizer.encode(large).shape == (3, 16)


def test_resized_pixels_stay_pixels() -> None:
    """Bicubic resizing of black and white overshoots."""
    tokenizer = random_tokenizer()
    small = (pictures(8, size=8) > 127).byte() * 255
    raw = F.interpolate(small.float(), size=(16, 16), mode="bicubic", antialias=True)
    assert torch.equal(tokenizer.encode(small), tokenizer.encode(raw.clamp(0, 255) / 255))
    assert not torch.equal(tokenizer.encode(small), tokenizer.encode(raw / 255)), "else nothing is compared"


def test_the_decoder_begins_as_an_encoder_does() -> None:
    """Weights of one deviation; those of block l that write into the residual stream divided by the root of 2 l."""
    shape = replace(shape_of(dim=96, hidden=192), decoder_layers=2)
    torch.manual_seed(0)
    decoder = FeatureDecoder(shape)
    for weight in (decoder.embed.weight, decoder.project[0].weight, decoder.position):
        assert float(weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    for number, block in enumerate(decoder.blocks, start=1):
        parts = dict(block.named_parameters())
        for name in ("attention.out.weight", "ffn.vision.down.weight"):
            assert float(parts[name].detach().std()) == pytest.approx(0.2 / math.sqrt(2 * number), rel=0.1)
        assert float(parts["attention.qkv.weight"].detach().std()) == pytest.approx(0.2, rel=0.1)


def test_the_decoder_drops_no_path() -> None:
    shape = replace(shape_of(drop_path=0.5), decoder_layers=2)
    decoder, layout = FeatureDecoder(shape).train(), random_tokenizer().encoder.layout(images_alone(pictures(), 16))
    codes_NF = torch.randn(48, 6)
    assert torch.equal(decoder(codes_NF, layout), decoder(codes_NF, layout))


def test_it_is_frozen_and_in_no_state_dict() -> None:
    holder = nn.ModuleDict({"visual": random_tokenizer(), "head": nn.Linear(2, 2)})
    holder.train()
    assert not any(module.training for module in holder["visual"].modules())
    assert [name for name, _ in holder.named_parameters()] == ["head.weight", "head.bias"]
    assert list(holder.state_dict()) == ["head.weight", "head.bias"]
    assert not holder["visual"].encode(pictures()).requires_grad  # type: ignore[operator]


def test_it_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    tokenizer = random_tokenizer(shape_of(CLIP, qkv_bias="qv"))
    tokenizer.save(tmp_path / "visual")
    again = load_visual_tokenizer(tmp_path / "visual")
    assert isinstance(again, VQKD)
    assert (again.shape, again.fingerprint) == (tokenizer.shape, tokenizer.fingerprint)
    assert torch.equal(again.encode(pictures()), tokenizer.encode(pictures()))
    ids_BN = torch.randint(0, 20, (2, 16))
    assert torch.equal(again.features(ids_BN), tokenizer.features(ids_BN))


def test_the_fingerprint_knows_the_weights_and_the_sizes() -> None:
    tensors = random_tensors(shape_of())
    one = VQKD(shape_of(), tensors).fingerprint
    changed = {**tensors, "codes.project.0.bias": tensors["codes.project.0.bias"] + 1e-6}
    assert VQKD(shape_of(), changed).fingerprint != one
    assert VQKD(shape_of(heads=2), tensors).fingerprint != one
    assert VQKD(shape_of(drop_path=0.5), tensors).fingerprint == one, "drop path is for training"


def test_the_fingerprint_stays_when_models_get_a_new_field() -> None:
    """Else an update of vlmoe would refuse every tokenizer that was saved before."""
    one = random_tokenizer().fingerprint

    class Later(ModelConfig):
        new_field: bool = False

    later = replace(shape_of(), model=Later.model_validate(shape_of().model.model_dump()))
    assert VQKD(later, random_tensors(later)).fingerprint == one


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("codes.quantiser.codes_KF"), "missing: 1, the first: codes.quantiser.codes_KF"),
        (lambda t: t.update({"decoder.cls": torch.zeros(3)}), "decoder.cls of the visual tokenizer is (3,), not (24,)"),
        (lambda t: t.update({"decoder.cls": torch.ones(24)}), "its fingerprint differs"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any, said: str) -> None:
    random_tokenizer().save(tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    damage(tensors)
    save_file(tensors, tmp_path / TENSOR_FILE)
    with pytest.raises(TokenizerError, match=re.escape(said)):
        load_visual_tokenizer(tmp_path)


def test_files_that_are_missing_or_senseless(tmp_path: Path) -> None:
    random_tokenizer().save(tmp_path)
    config = tmp_path / "visual_tokenizer.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "code_dim": "wide"}))
    with pytest.raises(TokenizerError, match="does not hold a vqkd"):
        load_visual_tokenizer(tmp_path)
    config.write_text(text)
    (tmp_path / TENSOR_FILE).unlink()
    with pytest.raises(TokenizerError, match="is not there"):
        load_visual_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"modality": "both"}, "model.modality: vision, not both"),
        ({"positions": "relative"}, "model.positions: absolute, not relative"),
        ({"moe": {"vision": {"num_experts": 2}}}, "leave out model.moe.vision"),
    ],
)
def test_other_encoders_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(said)):
        check_shape(replace(shape_of(), model=encoder_of(**values)))


def test_the_grids_must_agree_and_sizes_need_not() -> None:
    tokenizer = random_tokenizer()
    assert tokenizer.misfit(16, 4) is None
    assert tokenizer.misfit(224, 56) is None
    said = tokenizer.misfit(32, 4)
    assert said is not None
    assert "4 x 4 patches, the model one of 8 x 8" in said
    assert "model.image_size to 16" in said


def test_it_draws_codes_where_the_teacher_is_pixels() -> None:
    tokenizer = random_tokenizer()
    ids_BN = torch.randint(0, 20, (2, 16))
    drawn = tokenizer.decode(ids_BN, (4, 4))
    assert drawn.shape == (2, 3, 16, 16)
    assert torch.equal(drawn, PixelTeacher(4).images(tokenizer.features(ids_BN), (4, 4)))
    with pytest.raises(TokenizerError, match="ids 0 to 20 are not all codes"):
        tokenizer.decode(torch.arange(5, 21)[None].clamp(max=20).where(torch.arange(16) > 0, torch.tensor(0)))
    with pytest.raises(TokenizerError, match=r"a grid of 4 x 4 patches, not \(2, 8\)"):
        tokenizer.decode(ids_BN, (2, 8))


def test_features_of_a_model_are_no_picture() -> None:
    tokenizer = random_tokenizer(shape_of(CLIP))
    assert not tokenizer.draws
    assert tokenizer.features(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 7)
    with pytest.raises(TokenizerError, match="features of a-model, which are no picture"):
        tokenizer.decode(torch.zeros(2, 16, dtype=torch.int64))


def test_codes_are_told_in_sight_of_each_other() -> None:
    tokenizer = random_tokenizer()
    one, two = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64)
    two[0, 5] = 3
    assert not torch.allclose(tokenizer.features(one)[0, 0], tokenizer.features(two)[0, 0])
