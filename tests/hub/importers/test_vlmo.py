"""VLMo against a straight implementation: a file with its keys is imported, and gives its outputs."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hub.importers.support import EXACT, LENGTHS, encode, imported, some, vocab_file
from tests.hub.importers.vlmo_reference import TEXT_LENGTH, Reference, Sizes, random_state
from tests.model.support import Token, relative_row
from vlmoe_core.errors import CheckpointError, TokenizerError, UsageError
from vlmoe_core.hub.importers.importing import ImportOptions, import_model
from vlmoe_core.model.relative import resize_relative

RELATIVE, ABSOLUTE = Sizes(), Sizes(relative=False)


@pytest.fixture
def options(tmp_path: Path) -> ImportOptions:
    return ImportOptions(tokenizer=str(vocab_file(tmp_path, 50)))


def official_file(path: Path, sizes: Sizes = RELATIVE, **more: Any) -> Path:
    """As Lightning saves it."""
    state: dict[str, Any] = {"epoch": 3, "state_dict": random_state(sizes), "optimizer_states": [{}]}
    torch.save(state | more, path)
    return path


@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [(RELATIVE, torch.float64, 1e-10), (RELATIVE, torch.float32, 1e-5), (ABSOLUTE, torch.float32, 1e-5)],
)
@pytest.mark.parametrize("stream", ["image", "text", "pair"])
def test_the_outputs_are_those_of_a_straight_vlmo(
    stream: Any, sizes: Sizes, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    path = official_file(tmp_path / "vlmo.pt", sizes)
    options = ImportOptions(tokenizer=str(vocab_file(tmp_path, 50)), heads=3)
    encoder, _ = imported("vlmo", path, tmp_path / "out", options)
    state = {key: tensor.to(dtype) for key, tensor in random_state(sizes).items()}
    batch, theirs = some(stream, encoder.config), Reference(sizes, state)
    images, texts = encode(encoder.to(dtype), batch)
    words = batch.text_ids_T.split(LENGTHS) if stream != "image" else [None] * 3
    pixels = batch.pixels_ICHW.to(dtype) / 127.5 - 1 if stream != "text" else [None] * 3
    for number, (ids, image) in enumerate(zip(words, pixels, strict=True)):
        got = [*([texts[number]] if ids is not None else []), *([images[number]] if image is not None else [])]
        torch.testing.assert_close(torch.cat(got), theirs(ids, image), rtol=tolerance, atol=tolerance)


def test_the_reference_uses_every_kind_of_row() -> None:
    tokens: list[Token] = [("image", place) for place in range(17)] + [("text", place) for place in range(12)]
    used = {relative_row(query, key, RELATIVE.grid, TEXT_LENGTH) for query, key in product(tokens, tokens)}
    equal = RELATIVE.distances + 2 + TEXT_LENGTH - 2
    too_far = {equal + far for far in range(2 - TEXT_LENGTH, TEXT_LENGTH - 1) if abs(far) > 10}
    assert used == set(range(RELATIVE.distances + 2 + 2 * TEXT_LENGTH)) - too_far


@pytest.mark.parametrize("said", ["196", [196], None])
def test_a_length_of_texts_that_is_no_number_is_refused(said: Any, tmp_path: Path, options: ImportOptions) -> None:
    more = {"hyper_parameters": {"config": {"max_text_len_of_initckpt": said}}}
    path = official_file(tmp_path / "vlmo.ckpt", **more)
    with pytest.raises(
        CheckpointError, match=r"max_text_len_of_initckpt of the hyperparameters is .*not a whole number"
    ):
        import_model("vlmo", str(path), tmp_path / "out", options)


def test_sizes_and_switches_come_from_the_shapes(tmp_path: Path, options: ImportOptions) -> None:
    encoder, receipt = imported("vlmo", official_file(tmp_path / "vlmo.pt"), tmp_path / "out", options)
    config, keys = encoder.config, receipt["keys"]
    assert (config.layers, config.dim, config.hidden, config.heads, config.vl_layers) == (3, 24, 40, 3, 1)
    assert (config.patch_size, config.image_size, config.max_text_length) == (4, 16, 196)
    assert (config.attention, config.norm, config.positions) == ("shared", "per_modality", "relative")
    assert config.qkv_bias == "qv" and config.text_embed_norm and config.layer_scale == 0.1
    assert "blocks.2.attention.relative.table" in keys["relative_position_bias_table"]
    assert keys["text_embeddings.position_embeddings.weight"].startswith("unused: VLMo never reads it")
    assert keys["pooler.dense.weight"].startswith("unused: head")
    assert keys["(optimizer_states)"] == keys["(epoch)"] == "unused: of the training, not of the model"
    new = {name: said for name, said in receipt["tensors"].items() if said.startswith("new")}
    assert new == {"encoder.embeddings.image.mask": "new: VLMo hides no patches"}


def test_tables_for_other_texts_are_read_with_the_hyperparameters(tmp_path: Path, options: ImportOptions) -> None:
    state = random_state(RELATIVE)
    table = state["relative_position_bias_table"]
    # 196 -> 30 tokens: the same distances, fewer of them.
    state["relative_position_bias_table"] = resize_relative(table, 4, 4, 196, 30)
    torch.save({"state_dict": state}, tmp_path / "unsaid.ckpt")
    with pytest.raises(CheckpointError, match="are no square of patches"):
        import_model("vlmo", str(tmp_path / "unsaid.ckpt"), tmp_path / "out", options)
    said = {"hyper_parameters": {"config": {"max_text_len_of_initckpt": 30}}}
    torch.save({"state_dict": state, **said}, tmp_path / "said.ckpt")
    encoder, _ = imported("vlmo", tmp_path / "said.ckpt", tmp_path / "out", options)
    assert encoder.config.max_text_length == 30
    batch = some("text", encoder.config)
    wanted = Reference(RELATIVE, random_state(RELATIVE))(batch.text_ids_T[:7], None)
    torch.testing.assert_close(encode(encoder, batch)[1][0], wanted, **EXACT)


def test_a_second_image_of_nlvr2_is_encoded_as_the_first(tmp_path: Path, options: ImportOptions) -> None:
    state = random_state(RELATIVE)
    kinds = state["token_type_embeddings.weight"]
    state["token_type_embeddings.weight"] = torch.cat([kinds, kinds[1:] + 1])
    torch.save({"module": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "vlmo.pt")
    encoder, receipt = imported("vlmo", tmp_path / "vlmo.pt", tmp_path / "out", options)
    torch.testing.assert_close(encoder.embeddings.kind, kinds[[1, 0]])
    assert "module.token_type_embeddings.weight" in receipt["keys"]


def test_heads_stand_in_the_table_alone(tmp_path: Path, options: ImportOptions) -> None:
    path = official_file(tmp_path / "vlmo.pt")
    with pytest.raises(UsageError, match="--heads 4: the source has 3 heads"):
        import_model("vlmo", str(path), tmp_path / "out", ImportOptions(heads=4, tokenizer=options.tokenizer))
    path = official_file(tmp_path / "absolute.pt", ABSOLUTE)
    with pytest.raises(UsageError, match="give --heads N"):
        import_model("vlmo", str(path), tmp_path / "out", options)


def test_relative_positions_are_resampled(tmp_path: Path, options: ImportOptions) -> None:
    path = official_file(tmp_path / "vlmo.pt")
    larger = ImportOptions(image_size=24, tokenizer=options.tokenizer)
    encoder, _ = imported("vlmo", path, tmp_path / "out", larger)
    theirs: Tensor = random_state(RELATIVE)["relative_position_bias_table"][:, 3:6]
    table = encoder.get_parameter("blocks.1.attention.relative.table")
    assert encoder.config.image_size == 24 and table.shape == (11 * 11 + 3 + 2 + 2 * 196, 3)
    assert torch.equal(table[11 * 11 :], theirs[7 * 7 :])
    torch.testing.assert_close(table[11 * 11 // 2], theirs[7 * 7 // 2], **EXACT)
    assert encode(encoder, some("pair", encoder.config))[0].shape == (3, 37, 24)


def test_the_tokenizer_must_fit(tmp_path: Path) -> None:
    path = official_file(tmp_path / "vlmo.pt")
    with pytest.raises(UsageError, match=r"give --tokenizer \(the vocab.txt of bert-base-uncased\)"):
        import_model("vlmo", str(path), tmp_path / "out")
    with pytest.raises(TokenizerError, match="51 ids, more than the 50 rows"):
        large = ImportOptions(tokenizer=str(vocab_file(tmp_path, 51)))
        import_model("vlmo", str(path), tmp_path / "out", large)
