"""BEiT-3 against the torchscale package: a file with its keys is imported, and gives its outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.peers import ABSENT, available, stand_in_for_timm
from tests.hub.importers.support import EXACT, LENGTHS, encode, imported, normalised, some, spm_file
from tests.model.support import batch_of
from vlmoe_core.errors import CheckpointError, TokenizerError, UsageError
from vlmoe_core.hub.importers.fairseq_ids import read_fairseq_spm
from vlmoe_core.hub.importers.importing import ImportOptions, import_model
from vlmoe_core.hub.importers.ledger import Ledger
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.tokenizers.text import TextTokenizer, load_text_tokenizer

ROWS, HEADS, WIDTH, HIDDEN, LAYERS, TEXT = 64, 3, 24, 40, 3, 26
"""Sizes of the small BEiT-3; TEXT counts fairseq's two rows."""


def official_state() -> dict[str, Tensor]:
    """Random weights under the keys of the published files; that they are the right ones, torchscale shows below."""
    linear: dict[str, tuple[int, ...]] = {"fc1": (HIDDEN, WIDTH), "fc2": (WIDTH, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {
        "text_embed.weight": (ROWS, WIDTH),
        "vision_embed.cls_token": (1, 1, WIDTH),
        "vision_embed.mask_token": (1, 1, WIDTH),
        "vision_embed.proj.weight": (WIDTH, 3, 4, 4),
        "vision_embed.proj.bias": (WIDTH,),
        "encoder.embed_positions.A.weight": (16 + 1 + 2, WIDTH),
        "encoder.embed_positions.B.weight": (TEXT, WIDTH),
    }
    for way in "AB":
        norms = {f"encoder.layer_norm.{way}": WIDTH}
        for number in range(LAYERS):
            layer = f"encoder.layers.{number}"
            attention = f"{layer}.self_attn"
            norms |= {f"{layer}.{name}.{way}": WIDTH for name in ("self_attn_layer_norm", "final_layer_norm")}
            norms |= {f"{attention}.inner_attn_ln.{way}": WIDTH, f"{layer}.ffn.{way}.ffn_layernorm": HIDDEN}
            maps = {f"{attention}.{name}_proj.{way}": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
            maps |= {f"{layer}.ffn.{way}.{name}": shape for name, shape in linear.items()}
            shapes |= {f"{name}.weight": shape for name, shape in maps.items()}
            shapes |= {f"{name}.bias": shape[:1] for name, shape in maps.items()}
        shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    torch.manual_seed(0)
    return {f"beit3.{name}": torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def torchscale_beit3() -> nn.Module:
    """The same weights in torchscale's model, which takes no other names or shapes."""
    if not available():
        pytest.skip(ABSENT)
    stand_in_for_timm()
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    # As beit3/modeling_utils.py of microsoft/unilm has it, but for the sizes.
    config = EncoderConfig(
        encoder_embed_dim=WIDTH,
        encoder_attention_heads=HEADS,
        encoder_ffn_embed_dim=HIDDEN,
        encoder_layers=LAYERS,
        img_size=16,
        patch_size=4,
        vocab_size=ROWS,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=True,
        no_output_layer=True,
        max_source_positions=TEXT,
    )
    theirs: nn.Module = BEiT3(config).eval()
    theirs.load_state_dict({key.removeprefix("beit3."): tensor for key, tensor in official_state().items()})
    return theirs


def official_file(path: Path, **more: Tensor) -> Path:
    """As BEiT3Wrapper saves it: everything below `beit3.`, heads beside it."""
    torch.save({"model": official_state() | more}, path)
    return path


@pytest.fixture
def options(tmp_path: Path) -> ImportOptions:
    return ImportOptions(heads=HEADS, tokenizer=str(spm_file(tmp_path)))


def theirs_of(theirs: nn.Module, config: ModelConfig, stream: Any) -> list[Tensor]:
    """Outputs one sequence at a time, so that nothing is padded: the image's tokens first."""
    batch = some(stream, config)
    texts = batch.text_ids_T.split(LENGTHS) if stream != "image" else [None] * 3
    pixels = normalised(batch) if stream != "text" else [None] * 3
    with torch.no_grad():
        return [
            theirs(
                textual_tokens=None if ids is None else ids[None], visual_tokens=None if image is None else image[None]
            )["encoder_out"][0]
            for ids, image in zip(texts, pixels, strict=True)
        ]


@pytest.mark.parametrize("stream", ["image", "text", "pair"])
def test_the_outputs_are_those_of_torchscale(stream: Any, tmp_path: Path, options: ImportOptions) -> None:
    theirs = torchscale_beit3()
    encoder, _ = imported("beit3", official_file(tmp_path / "b.pth"), tmp_path / "out", options)
    images, texts = encode(encoder, some(stream, encoder.config))
    for number, wanted in enumerate(theirs_of(theirs, encoder.config, stream)):
        got = [*([images[number]] if stream != "text" else []), *([texts[number]] if stream != "image" else [])]
        torch.testing.assert_close(torch.cat(got), wanted, **EXACT)


def test_hidden_patches_have_the_embedding_of_torchscale(tmp_path: Path, options: ImportOptions) -> None:
    theirs = torchscale_beit3()
    encoder, _ = imported("beit3", official_file(tmp_path / "b.pth"), tmp_path / "out", options)
    batch = batch_of("image", LENGTHS, encoder.config)
    assert batch.patch_mask_IP.any()
    with torch.no_grad():
        wanted = theirs(visual_tokens=normalised(batch), vision_masked_position=batch.patch_mask_IP)["encoder_out"]
    torch.testing.assert_close(encode(encoder, batch)[0], wanted, **EXACT)


def test_sizes_and_switches_come_from_the_shapes(tmp_path: Path, options: ImportOptions) -> None:
    encoder, receipt = imported("beit3", official_file(tmp_path / "b.pth"), tmp_path / "o", options)
    config = encoder.config
    assert (config.layers, config.dim, config.hidden, config.heads, config.vl_layers) == (3, 24, 40, 3, 0)
    assert (config.patch_size, config.image_size, config.max_text_length) == (4, 16, 24)
    assert config.attention == config.norm == "per_modality" and config.sub_norm and config.norm_eps == 1e-5
    assert config.qkv_bias == "all" and config.layer_scale is None and config.positions == "absolute"
    assert receipt["keys"]["beit3.text_embed.weight"] == "encoder.embeddings.text.word.weight"
    assert not any(said.startswith("unused") for said in receipt["keys"].values())
    assert not any(said.startswith("new") for said in receipt["tensors"].values())


def test_heads_of_its_training_are_named_as_unused(tmp_path: Path, options: ImportOptions) -> None:
    path = official_file(tmp_path / "b.pth", **{"mlm_head.weight": torch.zeros(ROWS, 24)})
    _, receipt = imported("beit3", path, tmp_path / "out", options)
    assert receipt["keys"]["mlm_head.weight"].startswith("unused: head of BEiT-3's masked words")


def test_an_unknown_key_is_refused_by_name(tmp_path: Path, options: ImportOptions) -> None:
    path = official_file(tmp_path / "b.pth", **{"beit3.encoder.gate.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"1 keys of the source are unknown: beit3\.encoder\.gate\.weight"):
        import_model("beit3", str(path), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    lenient = ImportOptions(heads=HEADS, tokenizer=options.tokenizer, allow_unknown=True)
    _, receipt = imported("beit3", path, tmp_path / "out", lenient)
    assert receipt["keys"]["beit3.encoder.gate.weight"] == "unused: unknown, left out as asked (--allow-unknown)"


def test_a_missing_key_is_refused_by_name(tmp_path: Path, options: ImportOptions) -> None:
    state = official_state()
    del state["beit3.encoder.layers.1.ffn.B.fc2.bias"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"'beit3\.encoder\.layers\.1\.ffn\.B\.fc2\.bias' is missing"):
        import_model("beit3", str(tmp_path / "b.pth"), tmp_path / "out", options)


@pytest.mark.parametrize(("heads", "message"), [(None, "give --heads N"), (5, "heads .5. must divide dim .24.")])
def test_heads_are_never_guessed(heads: int | None, message: str, tmp_path: Path, options: ImportOptions) -> None:
    path = official_file(tmp_path / "b.pth")
    with pytest.raises((UsageError, CheckpointError), match=message):
        import_model("beit3", str(path), tmp_path / "out", ImportOptions(heads=heads, tokenizer=options.tokenizer))


def test_heads_may_differ_from_the_published_ones_if_asked() -> None:
    ledger = Ledger({}, {}, 8)
    assert ledger.heads(768, None, {768: 12}) == 8
    assert ledger.notes == ["8 heads, as asked; the published model of this width has 12"]
    assert Ledger({}, {}).heads(768, None, {768: 12}) == 12 and Ledger({}, {}).heads(768, 6, {768: 12}) == 6


def test_its_tokenizer_travels_with_the_ids_of_fairseq(tmp_path: Path, options: ImportOptions) -> None:
    encoder, receipt = imported("beit3", official_file(tmp_path / "b.pth"), tmp_path / "out", options)
    text = load_text_tokenizer(str(tmp_path / "out" / "tokenizers" / "text"))
    assert text.fingerprint == TextTokenizer(read_fairseq_spm(Path(str(options.tokenizer)))).fingerprint
    assert (text.cls_id, text.pad_id, text.sep_id, text.unk_id, text.mask_id) == (0, 1, 2, 3, 61)
    assert encoder.embeddings.text.word.num_embeddings == ROWS
    assert "2 of 64 rows of the word embedding have no token" in receipt["notes"]


def test_a_text_model_needs_its_tokenizer(tmp_path: Path) -> None:
    path = official_file(tmp_path / "b.pth")
    with pytest.raises(UsageError, match=r"no tokenizer came along: give --tokenizer \(beit3\.spm\)"):
        import_model("beit3", str(path), tmp_path / "out", ImportOptions(heads=HEADS))
    large = spm_file(tmp_path, vocab_size=64)
    with pytest.raises(TokenizerError, match="66 ids, more than the 64 rows"):
        import_model("beit3", str(path), tmp_path / "out", ImportOptions(heads=HEADS, tokenizer=str(large)))


def test_positions_are_resampled(tmp_path: Path, options: ImportOptions) -> None:
    path = official_file(tmp_path / "b.pth")
    larger = ImportOptions(image_size=24, heads=HEADS, tokenizer=options.tokenizer)
    encoder, receipt = imported("beit3", path, tmp_path / "out", larger)
    assert encoder.config.image_size == 24
    # The rule of BEiT-3's own load_model_and_may_interpolate: 2 rows of fairseq, [CLS], then a bicubic plane.
    table = official_state()["beit3.encoder.embed_positions.A.weight"]
    plane = table[3:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    plane = nn.functional.interpolate(plane, size=(6, 6), mode="bicubic", align_corners=False)
    wanted = torch.cat([table[2:3], plane.permute(0, 2, 3, 1).reshape(36, 24)])
    torch.testing.assert_close(encoder.embeddings.image.position, wanted, **EXACT)
    assert "positions resampled from 4 x 4 to 6 x 6 patches" in receipt["notes"]
    with pytest.raises(UsageError, match="--image-size 23 is no multiple of the patch size 4; try 24"):
        import_model("beit3", str(path), tmp_path / "other", ImportOptions(23, HEADS, options.tokenizer))
