"""BEiT and BEiT v2 (arXiv 2106.08254, 2208.06366): the files of microsoft/unilm, and folders of transformers.

They have no text path: ours stays as it was initialised.
"""

import re
from dataclasses import dataclass

import torch

from vlmoe_core.errors import CheckpointError
from vlmoe_core.hub.importers.ledger import Ledger, model_config, side_of
from vlmoe_core.model.config import ModelConfig

HEADS = {768: 12, 1024: 16}
"""Of the published widths, base and large."""
NORM_EPS = 1e-6
LAYER_SCALE = 0.1
TEXT_LENGTH = 128
"""Rows of the text positions, which are new."""
NO_TEXT = "BEiT has no text path"


@dataclass(frozen=True)
class Dialect:
    """How one code base names the parts of a BEiT; those of a block follow its number."""

    patch: str
    cls: str
    mask: str
    position: str
    shared: str
    """The relative table of all blocks."""
    blocks: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    """One joint weight, or three."""
    biases: tuple[str, str]
    """Of query and value."""
    relative: str
    """The relative table of one block."""
    out: str
    up: str
    down: str
    scales: tuple[str, str]
    final: tuple[str, ...]
    """Where the final norm may be, the first that is there."""


OFFICIAL = Dialect(
    patch="patch_embed.proj",
    cls="cls_token",
    mask="mask_token",
    position="pos_embed",
    shared="rel_pos_bias.relative_position_bias_table",
    blocks="blocks",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    biases=("attn.q_bias", "attn.v_bias"),
    relative="attn.relative_position_bias_table",
    out="attn.proj",
    up="mlp.fc1",
    down="mlp.fc2",
    scales=("gamma_1", "gamma_2"),
    final=("norm",),
)


def transformers_dialect(base: str) -> Dialect:
    """The names of transformers' BEiT, whose encoder's keys begin with `base`."""
    attention = "attention.attention"
    return Dialect(
        patch=f"{base}embeddings.patch_embeddings.projection",
        cls=f"{base}embeddings.cls_token",
        mask=f"{base}embeddings.mask_token",
        position=f"{base}embeddings.position_embeddings",
        shared=f"{base}encoder.relative_position_bias.relative_position_bias_table",
        blocks=f"{base}encoder.layer",
        norms=("layernorm_before", "layernorm_after"),
        qkv=tuple(f"{attention}.{name}" for name in ("query", "key", "value")),
        biases=(f"{attention}.query.bias", f"{attention}.value.bias"),
        relative=f"{attention}.relative_position_bias.relative_position_bias_table",
        out="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
        scales=("lambda_1", "lambda_2"),
        final=(f"{base}layernorm", "layernorm"),
    )


UNUSED = {
    r".*relative_position_index": "an index that follows from the sizes",
    r"lm_head\..*|cls_pt_(layers|norm|lm_head)\..*": "head of BEiT's visual codes, which are not ours",
    r"layernorm\..*": "norm of BEiT's head of visual codes",
    r"fc_norm\..*|(beit\.)?pooler\..*": "norm of the mean of the patches: part of BEiT's classifier",
    r"(head|classifier)\..*": "head: BEiT's classes",
    r"(decode_head|auxiliary_head|fpn\d|beit\.fpn\d)\..*": "head of BEiT's segmentation",
}


def map_beit(ledger: Ledger) -> ModelConfig:
    """Fill the image path of the encoder from the keys of BEiT.

    Raises:
        CheckpointError: a key is missing, the shapes make no model, or the config asks for what the encoder lacks.
        UsageError: the number of heads is not known.
    """
    names = _dialect(ledger)
    _check_settings(ledger)
    layers = ledger.count(rf"{re.escape(names.blocks)}\.(\d+)\.")
    patch, first = ledger.shape(f"{names.patch}.weight", 4), f"{names.blocks}.0"
    positions = _kind_of_positions(ledger, names)
    grid = _grid(ledger, names)
    for number in range(layers):
        _map_block(ledger, names, f"{names.blocks}.{number}", f"blocks.{number}", patch[0])
    if positions == "relative_shared":
        _fill_table(ledger, "relative.table", names.shared)
    table = {"relative": f"{first}.{names.relative}", "relative_shared": names.shared}.get(positions)
    known = ledger.shape(table, 2)[1] if table else ledger.settings.get("num_attention_heads")
    _map_image(ledger, names, patch[0], grid)
    _map_rest(ledger, names)
    return model_config(
        layers=layers,
        dim=patch[0],
        heads=ledger.heads(patch[0], known, HEADS),
        hidden=ledger.shape(f"{first}.{names.up}.weight", 2)[0],
        vl_layers=0,
        patch_size=patch[2],
        image_size=patch[2] * grid,
        max_text_length=TEXT_LENGTH,
        positions=positions,
        qkv_bias="qv" if f"{first}.{names.biases[0]}" in ledger else "none",
        layer_scale=LAYER_SCALE if f"{first}.{names.scales[0]}" in ledger else None,
        norm_eps=ledger.settings.get("layer_norm_eps", NORM_EPS),
    )


def _dialect(ledger: Ledger) -> Dialect:
    for base in ("beit.", ""):
        if f"{base}embeddings.cls_token" in ledger:
            return transformers_dialect(base)
    return OFFICIAL


def _check_settings(ledger: Ledger) -> None:
    activation = ledger.settings.get("hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"config.json says hidden_act: {activation}; the encoder has gelu alone")


def _kind_of_positions(ledger: Ledger, names: Dialect) -> str:
    own, shared = f"{names.blocks}.0.{names.relative}" in ledger, names.shared in ledger
    if own and shared:
        raise CheckpointError(
            "the source has relative positions in each block and shared ones; the encoder has one kind"
        )
    return "relative" if own else "relative_shared" if shared else "absolute"


def _grid(ledger: Ledger, names: Dialect) -> int:
    """Patches along a side, from the positions."""
    if names.position in ledger:
        return side_of(ledger.shape(names.position, 3)[1] - 1, names.position)
    for table in (names.shared, f"{names.blocks}.0.{names.relative}"):
        if table in ledger:
            return (side_of(ledger.shape(table, 2)[0] - 3, table) + 1) // 2
    raise CheckpointError("the source has no positions of any kind; is it a BEiT?")


def _map_block(ledger: Ledger, names: Dialect, theirs: str, ours: str, width: int) -> None:
    attention, ffn = f"{ours}.attention", f"{ours}.ffn.vision"
    for number, norm in enumerate(names.norms, start=1):
        ledger.fill_pair(f"{ours}.norm{number}", f"{theirs}.{norm}")
    keys = [f"{theirs}.{name}.weight" for name in names.qkv]
    ledger.fill(f"{attention}.qkv.weight", keys, ledger.joined(keys, None, width))
    for ours_bias, bias in zip(("q_bias", "v_bias"), names.biases, strict=True):
        if f"{theirs}.{bias}" in ledger:
            ledger.fill(f"{attention}.{ours_bias}", f"{theirs}.{bias}")
    if f"{theirs}.{names.relative}" in ledger:
        _fill_table(ledger, f"{attention}.relative.table", f"{theirs}.{names.relative}")
    ledger.fill_pair(f"{attention}.out", f"{theirs}.{names.out}")
    ledger.fill_pair(f"{ffn}.up", f"{theirs}.{names.up}")
    ledger.fill_pair(f"{ffn}.down", f"{theirs}.{names.down}")
    for number, scale in enumerate(names.scales, start=1):
        if f"{theirs}.{scale}" in ledger:
            ledger.fill(f"{ours}.scale{number}", f"{theirs}.{scale}")


def _fill_table(ledger: Ledger, ours: str, key: str) -> None:
    """The distances within an image; those of texts follow them in our table and begin at 0."""
    table_RH = ledger.tensor(key, None, None)
    texts_RH = table_RH.new_zeros(2 + 2 * TEXT_LENGTH, table_RH.shape[1])
    ledger.fill(ours, key, torch.cat([table_RH, texts_RH]))


def _map_image(ledger: Ledger, names: Dialect, width: int, grid: int) -> None:
    image = "embeddings.image"
    ledger.fill_patches(f"{image}.patch.proj", names.patch)
    ledger.fill_flat(f"{image}.cls", names.cls)
    if names.mask in ledger:
        ledger.fill_flat(f"{image}.mask", names.mask)
    ledger.fresh[r"embeddings\.image\.mask"] = "this BEiT hides no patches"
    if names.position in ledger:
        ledger.fill(f"{image}.position", names.position, ledger.tensor(names.position, 1, None, None)[0])
    else:
        zeros = torch.zeros(1 + grid**2, width)
        ledger.constant(f"{image}.position", zeros, "0: this BEiT's positions are relative")
    ledger.constant("embeddings.kind", torch.zeros(2, width), "0: BEiT has no embedding of the kind")


def _map_rest(ledger: Ledger, names: Dialect) -> None:
    """The final norm, what has no counterpart here, and what has none there."""
    final = next((name for name in names.final if f"{name}.weight" in ledger), None)
    if final is not None:
        ledger.fill_pair("norm", final)
    ledger.fresh[r"norm\..*"] = "this BEiT normalises the mean of the patches instead of each token"
    ledger.fresh[r"embeddings\.text\..*|blocks\.\d+\.ffn\.text\..*"] = NO_TEXT
    ledger.leave(UNUSED)
