"""Published files of VQ-KD: built here with the same keys and shapes, against a straight implementation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hub.importers.support import EXACT
from tests.hub.importers.test_torch_files import Code
from tests.hub.importers.vqkd_reference import BASE, Reference, Sizes, published_file, published_shapes, random_state
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hub.importers.importing import ImportOptions, import_model
from vlmoe_core.hub.importers.ledger import Ledger
from vlmoe_core.hub.importers.vqkd import map_vqkd, tensors_of
from vlmoe_core.tokenizers.vqkd import VQKD, images_alone, patches_of
from vlmoe_core.train.visual import find_visual_tokenizer

SIZES = Sizes()
HEADS = ImportOptions(heads=3)


def written(folder: Path, content: Any) -> str:
    path = folder / "vqkd.pth"
    torch.save(content, path)
    return str(path)


def imported(folder: Path, content: Any, options: ImportOptions = HEADS) -> tuple[VQKD, dict[str, Any]]:
    """The tokenizer of the folder that an import writes, and its import.json."""
    import_model("vqkd", written(folder, content), folder / "out", options)
    tokenizer = find_visual_tokenizer(str(folder / "out"))
    assert isinstance(tokenizer, VQKD)
    return tokenizer, json.loads((folder / "out" / "import.json").read_text())


def images(sizes: Sizes = SIZES, count: int = 5) -> Tensor:
    """Patches of strong colours, with noise in them."""
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(0, 192, (count, 3, sizes.grid, sizes.grid), generator=generator)
    plain = colours.repeat_interleave(sizes.patch, 2).repeat_interleave(sizes.patch, 3)
    return (plain + torch.randint(0, 64, plain.shape, generator=generator)).to(torch.uint8)


@pytest.mark.parametrize("sizes", [SIZES, Sizes(decoder_layers=1, teacher=16, code_dim=5, grid=3, layers=2)])
@torch.no_grad()
def test_tokens_and_features_of_the_published_architecture(sizes: Sizes, tmp_path: Path) -> None:
    tokenizer, _ = imported(tmp_path, published_file(sizes))
    theirs, pixels = Reference(sizes, random_state(sizes)), images(sizes)
    wanted = theirs.tokens(pixels / 255)
    assert len(wanted.unique()) >= 10
    assert torch.equal(tokenizer.encode(pixels), wanted) and torch.equal(tokenizer.encode(pixels / 255), wanted)
    states = patches_of(tokenizer.encoder(images_alone(pixels, sizes.grid**2)))
    torch.testing.assert_close(
        tokenizer.codes(states).view(5, -1, sizes.code_dim), theirs.features(pixels / 255), **EXACT
    )
    torch.testing.assert_close(tokenizer.features(wanted), theirs.decoded(wanted), **EXACT)


def test_the_sizes_come_from_the_shapes(tmp_path: Path) -> None:
    tokenizer, receipt = imported(tmp_path, published_file(SIZES))
    shape = tokenizer.shape
    assert (shape.codebook_size, shape.code_dim, shape.decoder_layers, shape.teacher.dim) == (40, 8, 3, 20)
    assert (shape.model.layers, shape.model.dim, shape.model.heads, shape.model.hidden) == (3, 24, 3, 96)
    assert (shape.model.patch_size, shape.model.image_size, shape.model.norm_eps) == (4, 16, 1e-6)
    assert "tokenizers.visual: {kind: vqkd, load: FOLDER, codebook_size: 40}" in receipt["notes"][-1]
    assert "its teacher was a model that the imported file does not name, 20 wide" in receipt["notes"][-1]
    counts = torch.arange(1.0, 41)
    torch.testing.assert_close(tokenizer.codes.quantiser.shares_K, counts / counts.sum())


def test_every_key_and_every_tensor_is_in_the_receipt(tmp_path: Path) -> None:
    content = published_file(SIZES)
    tokenizer, receipt = imported(tmp_path, content)
    assert set(receipt["keys"]) == {*content["model"], "(optimizer)", "(epoch)"}
    assert set(receipt["tensors"]) == {name for name, _ in tokenizer.named_buffers()}
    unused = {key for key, said in receipt["keys"].items() if said.startswith("unused: ")}
    began = {f"quantize.embedding.{name}" for name in ("cluster_size", "embed_avg", "initted")}
    assert unused == {
        "(optimizer)",
        "(epoch)",
        "teacher_model.visual.proj",
        "scaling_layer.shift",
        "loss.weight",
        *began,
    }
    constants = {name for name, said in receipt["tensors"].items() if said.startswith("constant: 0")}
    assert constants == {"encoder.embeddings.kind", "encoder.embeddings.image.mask"}
    assert not any(tokenizer.get_buffer(name).any() for name in constants)
    assert receipt["tensors"]["encoder.norm.weight"] == "encoder.fc_norm.weight"
    assert str(tmp_path) not in json.dumps(receipt)


@pytest.mark.parametrize(
    ("sizes", "teacher"),
    [
        (BASE, "openai/clip-vit-base-patch16"),
        (replace(BASE, decoder_layers=1), "openai/clip-vit-base-patch16"),
        (replace(BASE, decoder_layers=1, teacher=768), "facebook/dino-vitb16"),
    ],
)
def test_names_and_shapes_of_the_published_sizes(sizes: Sizes, teacher: str) -> None:
    """The three files of beit2/TOKENIZER.md, with tensors that need no memory."""
    found = {key: torch.zeros(()).expand(shape) for key, shape in published_shapes(sizes).items()}
    found["quantize.embedding.weight"] = torch.eye(1, 32).expand(8192, 32)
    ledger = Ledger(found, {})
    shape = map_vqkd(ledger)
    ledger.close(allow_unknown=False)
    ledger.settle(tensors_of(shape), "visual tokenizer")
    model = shape.model
    assert (model.layers, model.dim, model.heads, model.hidden, model.grid) == (12, 768, 12, 3072, 14)
    assert (model.image_size, model.patch_size, shape.codebook_size, shape.code_dim) == (224, 16, 8192, 32)
    assert (shape.decoder_layers, shape.teacher.dim) == (sizes.decoder_layers, sizes.teacher)
    assert shape.teacher.model == teacher
    assert ledger.used.keys() | ledger.unused.keys() == found.keys()


def test_a_state_dict_alone_in_half_precision(tmp_path: Path) -> None:
    state = {f"module.{key}": tensor.half() for key, tensor in random_state(SIZES).items()}
    tokenizer, receipt = imported(tmp_path, {"state_dict": state})
    assert all(buffer.dtype == torch.float32 for buffer in tokenizer.buffers())
    wanted = Reference(SIZES, {key.removeprefix("module."): tensor.float() for key, tensor in state.items()})
    assert torch.equal(tokenizer.encode(images()), wanted.tokens(images() / 255))
    assert receipt["keys"]["module.encoder.fc_norm.bias"] == "encoder.norm.bias"


def test_use_that_was_set_back_is_equal_shares(tmp_path: Path) -> None:
    state = random_state(SIZES) | {"quantize.cluster_size": torch.zeros(40)}
    tokenizer, receipt = imported(tmp_path, state)
    assert torch.equal(tokenizer.codes.quantiser.shares_K, torch.full((40,), 1 / 40))
    assert "equal shares are taken" in receipt["notes"][0]


def without(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for key in keys:
            del state[key]

    return change


def with_tensor(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: tensor})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without("encoder.fc_norm.bias", "decoder.blocks.1.attn.v_bias", "quantize.cluster_size"),
            r"3 keys of a VQ-KD tokenizer are missing in the source: .*quantize\.cluster_size.*v_bias.*fc_norm\.bias",
        ),
        (with_tensor("encoder.head.weight", torch.ones(3)), r"1 keys of the source are unknown: encoder\.head\.weight"),
        (
            with_tensor("encoder.blocks.2.mlp.fc1.weight", torch.ones(30, 24)),
            r"fc1\.weight' makes encoder\.blocks\.2\.ffn\.vision\.up\.weight of shape \(30, 24\), but this visual tok",
        ),
        (with_tensor("decoder.pos_embed", torch.ones(1, 10, 24)), r"makes decoder\.position of shape \(10, 24\)"),
        (with_tensor("encoder.pos_embed", torch.ones(1, 12, 24)), r"11 places are no square of patches"),
        (
            with_tensor("encoder.cls_token", torch.ones(24)),
            r"'encoder\.cls_token' is of shape \(24,\), not \(1, 1, any\)",
        ),
        (with_tensor("decoder.patch_embed.proj.weight", torch.ones(24, 2, 2, 2)), r"not \(any, any, 1, 1\)"),
        (with_tensor("quantize.embedding.weight", torch.zeros(40, 8)), r"codes of length 0 to 0, not unit vectors"),
        (with_tensor("quantize.embedding.weight", torch.full((40, 8), torch.nan)), "not unit vectors"),
    ],
)
def test_what_does_not_fit_is_refused(spoil: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    state = random_state(SIZES)
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        imported(tmp_path, {"model": state})
    assert [path.name for path in tmp_path.iterdir()] == ["vqkd.pth"]


@pytest.mark.parametrize("size", [(), (5,), (2, 3, 5, 7)])
def test_any_key_of_another_shape_is_refused(size: tuple[int, ...]) -> None:
    state = random_state(SIZES)
    for key in (key for key in state if not any(f".{number}." in key for number in (1, 2))):
        ledger = Ledger(state | {key: torch.ones(size)}, {}, 3)
        try:
            ledger.settle(tensors_of(map_vqkd(ledger)), "visual tokenizer")
        except CheckpointError:
            continue
        assert key in ledger.unused, key


def test_an_unknown_key_is_left_out_when_asked(tmp_path: Path) -> None:
    state = random_state(SIZES) | {"encoder.head.weight": torch.ones(3)}
    _, receipt = imported(tmp_path, state, ImportOptions(heads=3, allow_unknown=True))
    assert receipt["keys"]["encoder.head.weight"].startswith("unused: unknown, left out as asked")


def test_a_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    content = published_file(SIZES) | {"args": Code(tmp_path / "ran")}
    with pytest.raises(CheckpointError, match="loading that could run code"):
        imported(tmp_path, content)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    state = {key.removeprefix("encoder."): tensor for key, tensor in random_state(SIZES).items() if "encoder" in key}
    with pytest.raises(CheckpointError, match="this is another kind of model"):
        imported(tmp_path, {"model": state})


def test_the_heads_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no published model is 24 wide; give --heads N .*768 \(12\)"):
        imported(tmp_path, published_file(SIZES), ImportOptions())


def test_options_of_encoders_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, published_file(SIZES))
    for options in (ImportOptions(tokenizer="x"), ImportOptions(image_size=32), ImportOptions(imagenet_pixels=True)):
        with pytest.raises(UsageError, match=r"--\S+: a visual tokenizer keeps its pixels and positions"):
            import_model("vqkd", path, tmp_path / "out", options)


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already and not empty"):
        import_model("vqkd", written(tmp_path, published_file(SIZES)), tmp_path, HEADS)
