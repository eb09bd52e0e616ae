"""VLMo (arXiv 2111.02358): the files of microsoft/unilm.

Attention and its norm are shared; each feed-forward network has its own norm before it; pairs have networks of their
own in the top blocks. Base and large have one table of relative positions, base plus has absolute ones.
"""

import torch
from torch import Tensor

from vlmoe_core.errors import CheckpointError
from vlmoe_core.hub.importers.ledger import Ledger, model_config, side_of
from vlmoe_core.model.config import ModelConfig

HEADS = {768: 12, 1024: 16, 544: 16}
"""Of the published widths, base, large and base plus."""
NORM_EPS = 1e-6
LAYER_SCALE = 0.1
TEXT_LENGTH = 196
"""Tokens of a text that the published relative tables are made for (`max_text_len_of_initckpt`)."""
TABLE = "relative_position_bias_table"
NETWORKS = {"imag": "vision", "text": "text", "vl": "vl"}
TEXT = "text_embeddings"
UNUSED = {
    r".*relative_position_index|.*position_ids": "an index that follows from the sizes",
    r"pooler\..*": "head: VLMo's pooler of the fused [CLS]",
    r"mlm_score\..*": "head of VLMo's masked words: a pretraining run of ours has its own",
    r"itm_score\..*": "head of VLMo's image-text matching",
    r"itc_.*|logit_(vl_)?scale": "head of VLMo's contrastive loss",
    r"(vqa|nlvr2)_classifier\..*": "head of a task that VLMo was finetuned on",
}


def map_vlmo(ledger: Ledger) -> ModelConfig:
    """Fill the encoder from the keys of VLMo.

    Raises:
        CheckpointError: a key is missing, or the shapes make no model.
        UsageError: the number of heads is not known.
    """
    layers = ledger.count(r"transformer\.blocks\.(\d+)\.")
    width = ledger.shape("transformer.cls_token", 3)[2]
    patch = ledger.shape("transformer.patch_embed.proj.weight", 4)[3]
    relative = TABLE in ledger
    heads = ledger.heads(width, ledger.shape(TABLE, 2)[1] // layers if relative else None, HEADS)
    for number in range(layers):
        _map_block(ledger, f"transformer.blocks.{number}", f"blocks.{number}")
    ledger.fill_pair("norm", "transformer.norm")
    grid, length = _map_relative(ledger, layers, heads) if relative else _absolute_sizes(ledger)
    _map_image(ledger, width, grid, relative)
    _map_text(ledger, width, length, relative)
    ledger.leave(UNUSED)
    return model_config(
        layers=layers,
        dim=width,
        heads=heads,
        hidden=ledger.shape("transformer.blocks.0.mlp_imag.fc1.weight", 2)[0],
        vl_layers=sum(f"transformer.blocks.{number}.mlp_vl.fc1.weight" in ledger for number in range(layers)),
        patch_size=patch,
        image_size=patch * grid,
        max_text_length=length,
        norm="per_modality",
        positions="relative" if relative else "absolute",
        qkv_bias="qv" if "transformer.blocks.0.attn.q_bias" in ledger else "none",
        layer_scale=LAYER_SCALE if "transformer.blocks.0.gamma_1" in ledger else None,
        norm_eps=NORM_EPS,
        text_embed_norm=True,
    )


def _map_block(ledger: Ledger, theirs: str, ours: str) -> None:
    attention = f"{ours}.attention"
    ledger.fill_pair(f"{ours}.norm1", f"{theirs}.norm1")
    ledger.fill(f"{attention}.qkv.weight", f"{theirs}.attn.qkv.weight")
    for name in ("q_bias", "v_bias"):
        if f"{theirs}.attn.{name}" in ledger:
            ledger.fill(f"{attention}.{name}", f"{theirs}.attn.{name}")
    ledger.fill_pair(f"{attention}.out", f"{theirs}.attn.proj")
    for network, name in NETWORKS.items():
        if f"{theirs}.mlp_{network}.fc1.weight" in ledger:
            ledger.fill_pair(f"{ours}.norm2.{name}", f"{theirs}.norm2_{network}")
            ledger.fill_pair(f"{ours}.ffn.{name}.up", f"{theirs}.mlp_{network}.fc1")
            ledger.fill_pair(f"{ours}.ffn.{name}.down", f"{theirs}.mlp_{network}.fc2")
    for number in (1, 2):
        if f"{theirs}.gamma_{number}" in ledger:
            ledger.fill(f"{ours}.scale{number}", f"{theirs}.gamma_{number}")


def _map_relative(ledger: Ledger, layers: int, heads: int) -> tuple[int, int]:
    """One table holds the columns of all blocks, block after block. Returns the grid and the longest text."""
    length = ledger.settings.get("max_text_len_of_initckpt", TEXT_LENGTH)
    if not isinstance(length, int):
        raise CheckpointError(f"max_text_len_of_initckpt of the hyperparameters is {length!r}, not a whole number")
    table = ledger.tensor(TABLE, None, layers * heads)
    grid = (side_of(table.shape[0] - 3 - 2 - 2 * length, f"{TABLE} for texts of {length} tokens") + 1) // 2
    for number, columns in enumerate(torch.split(table, heads, dim=1)):
        ledger.fill(f"blocks.{number}.attention.relative.table", TABLE, columns.contiguous())
    return grid, length


def _absolute_sizes(ledger: Ledger) -> tuple[int, int]:
    """The grid and the longest text."""
    rows = ledger.shape("transformer.pos_embed", 3)[1]
    return side_of(rows - 1, "transformer.pos_embed"), ledger.shape(f"{TEXT}.position_embeddings.weight", 2)[0]


def _map_image(ledger: Ledger, width: int, grid: int, relative: bool) -> None:
    image = "embeddings.image"
    ledger.fill_patches(f"{image}.patch.proj", "transformer.patch_embed.proj")
    ledger.fill_flat(f"{image}.cls", "transformer.cls_token")
    ledger.fresh[r"embeddings\.image\.mask"] = "VLMo hides no patches"
    if relative:
        ledger.constant(f"{image}.position", torch.zeros(1 + grid**2, width), "0: VLMo's positions are relative")
    else:
        ledger.fill(
            f"{image}.position", "transformer.pos_embed", ledger.tensor("transformer.pos_embed", 1, None, width)[0]
        )


def _map_text(ledger: Ledger, width: int, length: int, relative: bool) -> None:
    """BERT's embeddings, whose token type is always 0, so that its row goes into the positions; then the two kinds."""
    text, types = "embeddings.text", f"{TEXT}.token_type_embeddings.weight"
    positions, kinds = f"{TEXT}.position_embeddings.weight", "token_type_embeddings.weight"
    first = ledger.tensor(types, None, width)[0]
    words = f"{TEXT}.word_embeddings.weight"
    ledger.fill(f"{text}.word.weight", words, ledger.tensor(words, None, width))
    ledger.fill_pair(f"{text}.norm", f"{TEXT}.LayerNorm")
    if relative:
        ledger.fill(f"{text}.position", types, first.expand(length, -1).contiguous())
        ledger.leave({positions.replace(".", r"\."): "VLMo never reads it: its positions are relative"})
    else:
        ledger.fill(f"{text}.position", [positions, types], ledger.tensor(positions, None, width) + first)
    ledger.fill("embeddings.kind", kinds, _kinds(ledger, kinds, width))


def _kinds(ledger: Ledger, key: str, width: int) -> Tensor:
    """Ours are image, text; VLMo's are text, image, and in NLVR2 a second image, which we encode as the first."""
    rows = 3 if ledger.shape(key, 2)[0] == 3 else 2
    return ledger.tensor(key, rows, width)[[1, 0]]
