"""BEiT against transformers: a folder that it saved, or a file with the official keys, gives its outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hub.importers.support import EXACT, encode, imported, normalised, some, vocab_file
from tests.model.support import batch_of, randomise
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hub.importers.importing import ImportOptions, import_model
from vlmoe_core.model.encoder import Encoder

IMAGES = (0, 0, 0)
POSITIONS: list[dict[str, bool]] = [
    {"use_absolute_position_embeddings": True},
    {"use_relative_position_bias": True},
    {"use_shared_relative_position_bias": True},
    {"use_absolute_position_embeddings": True, "use_relative_position_bias": True},
]


def beit_config(**values: Any) -> Any:
    from transformers import BeitConfig

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    small = {**sizes, "image_size": 16, "patch_size": 4, "use_mask_token": True, "use_mean_pooling": False}
    return BeitConfig(**{**small, **values})


def beit(**values: Any) -> nn.Module:
    from transformers import BeitModel

    torch.manual_seed(0)
    theirs: nn.Module = BeitModel(beit_config(**values), add_pooling_layer=False).eval()
    randomise(theirs)
    return theirs


def folder_of(theirs: Any, path: Path) -> Path:
    theirs.save_pretrained(path)
    return path


def official(theirs: nn.Module) -> dict[str, Tensor]:
    """The same weights under the keys of microsoft/unilm (beit/modeling_pretrain.py)."""
    plain = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "shared_position_bias.": "rel_pos_bias.",
        "layernorm.": "norm.",
        "layers.": "blocks.",
        ".layernorm_before.": ".norm1.",
        ".layernorm_after.": ".norm2.",
        ".lambda_": ".gamma_",
        ".attention.o_proj.": ".attn.proj.",
        ".relative_position_bias.": ".attn.",
    }
    state: dict[str, Tensor] = {}
    for key, tensor in theirs.state_dict().items():
        name = key
        for before, after in plain.items():
            name = after + name.removeprefix(before) if name.startswith(before) else name.replace(before, after)
        state[name] = tensor
    for number in range(2):
        attention = f"blocks.{number}.attention"
        parts = [state.pop(f"{attention}.{letter}_proj.weight") for letter in "qkv"]
        state[f"blocks.{number}.attn.qkv.weight"] = torch.cat(parts)
        for letter in "qv":
            state[f"blocks.{number}.attn.{letter}_bias"] = state.pop(f"{attention}.{letter}_proj.bias")
    return state


@torch.no_grad()
def check(encoder: Encoder, theirs: nn.Module) -> None:
    batch = batch_of("image", IMAGES, encoder.config)
    assert batch.patch_mask_IP.any()
    wanted = theirs(normalised(batch), bool_masked_pos=batch.patch_mask_IP).last_hidden_state
    torch.testing.assert_close(encoder(batch).image_states_IND, wanted, **EXACT)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_folder_gives_the_outputs_of_transformers(positions: dict[str, bool], tmp_path: Path) -> None:
    theirs = beit(**positions)
    encoder, receipt = imported("beit", folder_of(theirs, tmp_path / "beit"), tmp_path / "out")
    check(encoder, theirs)
    assert encoder.config.heads == 3 and encoder.config.norm_eps == 1e-12 and encoder.config.qkv_bias == "qv"
    assert not any(said.startswith("unused") for said in receipt["keys"].values())
    new = {name for name, said in receipt["tensors"].items() if said == "new: BEiT has no text path"}
    assert new == {name for name in receipt["tensors"] if ".text." in name}


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_official_file_gives_the_same(positions: dict[str, bool], tmp_path: Path) -> None:
    theirs = beit(layer_norm_eps=1e-6, **positions)
    torch.save({"model": official(theirs)}, tmp_path / "beit.pth")
    encoder, receipt = imported("beit", tmp_path / "beit.pth", tmp_path / "out", ImportOptions(heads=3))
    check(encoder, theirs)
    assert encoder.config.norm_eps == 1e-6
    assert not any(said.startswith("unused") for said in receipt["keys"].values())


def test_the_heads_of_a_relative_table_are_known(tmp_path: Path) -> None:
    torch.save(official(beit(use_relative_position_bias=True)), tmp_path / "beit.pth")
    with pytest.raises(UsageError, match="--heads 4: the source has 3 heads"):
        import_model("beit", str(tmp_path / "beit.pth"), tmp_path / "out", ImportOptions(heads=4))
    encoder, _ = imported("beit", tmp_path / "beit.pth", tmp_path / "out")
    assert encoder.config.heads == 3


@pytest.mark.parametrize("positions", POSITIONS[1:3])
def test_a_sharded_folder_of_the_pretraining_class(positions: dict[str, bool], tmp_path: Path) -> None:
    from transformers import BeitForMaskedImageModeling

    torch.manual_seed(0)
    theirs: Any = BeitForMaskedImageModeling(beit_config(use_mean_pooling=True, vocab_size=64, **positions)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "beit", max_shard_size="20KB")
    assert (tmp_path / "beit" / "model.safetensors.index.json").exists()
    encoder, receipt = imported("beit", tmp_path / "beit", tmp_path / "out")
    batch = some("image", encoder.config)
    with torch.no_grad():
        wanted = theirs.layernorm(theirs.beit(normalised(batch)).last_hidden_state)
    torch.testing.assert_close(encode(encoder, batch)[0], wanted, **EXACT)
    assert receipt["keys"]["lm_head.weight"].startswith("unused: head of BEiT's visual codes")
    assert receipt["keys"]["layernorm.weight"] == "encoder.norm.weight"
    assert len(receipt["sha256"]) > 1


def test_of_two_norms_the_encoders_own_is_taken(tmp_path: Path) -> None:
    from transformers import BeitForMaskedImageModeling

    torch.manual_seed(0)
    config = beit_config(use_mean_pooling=False, vocab_size=64, use_relative_position_bias=True)
    theirs: Any = BeitForMaskedImageModeling(config).eval()
    randomise(theirs)
    encoder, receipt = imported("beit", folder_of(theirs, tmp_path / "beit"), tmp_path / "out")
    batch = some("image", encoder.config)
    with torch.no_grad():
        wanted = theirs.beit(normalised(batch)).last_hidden_state
    torch.testing.assert_close(encode(encoder, batch)[0], wanted, **EXACT)
    assert receipt["keys"]["layernorm.weight"].startswith("unused: norm of BEiT's head")


def test_a_classifier_has_no_final_norm_for_tokens(tmp_path: Path) -> None:
    from transformers import BeitForImageClassification

    torch.manual_seed(0)
    config = beit_config(use_mean_pooling=True, use_relative_position_bias=True, use_mask_token=False)
    theirs: Any = BeitForImageClassification(config).eval()
    randomise(theirs)
    encoder, receipt = imported("beit", folder_of(theirs, tmp_path / "beit"), tmp_path / "out")
    batch = some("image", encoder.config)
    with torch.no_grad():
        wanted = theirs.beit(normalised(batch)).last_hidden_state
        got = encoder(batch, ["blocks.1"]).intermediates["blocks.1"].view_as(wanted)
    torch.testing.assert_close(got, wanted, **EXACT)
    assert receipt["keys"]["beit.pooler.layernorm.weight"].startswith("unused: norm of the mean of the patches")
    assert receipt["tensors"]["encoder.norm.weight"].startswith("new: this BEiT normalises the mean")
    assert receipt["tensors"]["encoder.embeddings.image.mask"] == "new: this BEiT hides no patches"


def test_blocks_that_differ_are_refused(tmp_path: Path) -> None:
    state = official(beit(use_relative_position_bias=True))
    del state["blocks.0.attn.q_bias"], state["blocks.0.attn.v_bias"]
    torch.save(state, tmp_path / "beit.pth")
    with pytest.raises(
        CheckpointError, match=r"without a place blocks\.1\.attention\.q_bias, blocks\.1\.attention\.v_bias"
    ):
        import_model("beit", str(tmp_path / "beit.pth"), tmp_path / "out")


@pytest.mark.parametrize("from_settings", [True, False])
def test_other_pixels_are_folded_into_the_patches(from_settings: bool, tmp_path: Path) -> None:
    theirs = beit(use_absolute_position_embeddings=True)
    folder = folder_of(theirs, tmp_path / "beit")
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    if from_settings:
        settings = {"image_mean": mean, "image_std": deviation}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    options = ImportOptions(imagenet_pixels=not from_settings)
    encoder, receipt = imported("beit", folder, tmp_path / "out", options)
    batch = some("image", encoder.config)
    pixels = (batch.pixels_ICHW / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(encode(encoder, batch)[0], theirs(pixels).last_hidden_state, **EXACT)
    assert "folded into the patch embedding" in receipt["notes"][0]


def test_relative_positions_are_resampled(tmp_path: Path) -> None:
    theirs = beit(use_relative_position_bias=True)
    encoder, _ = imported("beit", folder_of(theirs, tmp_path / "b"), tmp_path / "out", ImportOptions(image_size=24))
    table = encoder.get_parameter("blocks.0.attention.relative.table")
    old = theirs.get_parameter("layers.0.relative_position_bias.relative_position_bias_table")
    patches = 11 * 11
    assert encoder.config.image_size == 24 and table.shape[0] == patches + 3 + 2 + 2 * 128
    # No distance, and the rows of [CLS], keep their values; the others lie between the old ones' extremes or near.
    torch.testing.assert_close(table[patches // 2], old[7 * 7 // 2], **EXACT)
    torch.testing.assert_close(table[0], old[0], **EXACT)
    assert torch.equal(table[patches : patches + 3], old[49:]) and not table[patches + 3 :].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "vit"}, UsageError, "config.json says model_type: vit, not beit"),
        ({"hidden_act": "relu"}, CheckpointError, "config.json says hidden_act: relu"),
    ],
)
def test_a_config_that_names_other_parts_is_refused(
    change: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = folder_of(beit(use_absolute_position_embeddings=True), tmp_path / "beit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        import_model("beit", str(folder), tmp_path / "out")


def test_a_text_tokenizer_may_come_with_it(tmp_path: Path) -> None:
    folder = folder_of(beit(use_absolute_position_embeddings=True), tmp_path / "beit")
    plain, _ = imported("beit", folder, tmp_path / "plain")
    assert plain.embeddings.text.word.num_embeddings == 16
    words, _ = imported("beit", folder, tmp_path / "out", ImportOptions(tokenizer=str(vocab_file(tmp_path, 40))))
    assert words.embeddings.text.word.num_embeddings == 40


def test_two_kinds_of_relative_positions_are_refused(tmp_path: Path) -> None:
    theirs = beit(use_relative_position_bias=True, use_shared_relative_position_bias=True)
    with pytest.raises(CheckpointError, match="relative positions in each block and shared ones"):
        import_model("beit", str(folder_of(theirs, tmp_path / "beit")), tmp_path / "out")
