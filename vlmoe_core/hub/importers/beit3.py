"""BEiT-3 (arXiv 2208.10442): the files of microsoft/unilm, whose encoder is the Multiway transformer of torchscale.

Way A of torchscale is the image's, way B the text's. Its [CLS], positions, attention, norms and networks all have two
ways; the top has no network of its own for pairs.
"""

import re

import torch

from vlmoe_core.hub.importers.ledger import Ledger, model_config, side_of
from vlmoe_core.model.config import ModelConfig

HEADS = {768: 12, 1024: 16}
"""Of the published widths, base and large."""
NORM_EPS = 1e-5
"""torchscale's `layernorm_eps`, which BEiT-3 leaves as it is."""
FIRST_POSITION = 2
"""fairseq counts positions from 2."""
WAYS = {"A": "vision", "B": "text"}
PREFIX = "beit3."
UNUSED = {
    r"mlm_head\..*": "head of BEiT-3's masked words: a pretraining run of ours has its own",
    r"mim_head\..*|beit3\.mim_head\..*": "head of BEiT-3's visual codes: our visual tokenizer has other codes",
    r"(language_head|vision_head)\..*|logit_scale|criterion\..*": "head of BEiT-3's retrieval",
    r"pooler\..*|head\..*|fc_norm\..*": "head of a task that BEiT-3 was finetuned on",
}


def map_beit3(ledger: Ledger) -> ModelConfig:
    """Fill the encoder from the keys of BEiT-3.

    Raises:
        CheckpointError: a key is missing, or the shapes make no model.
        UsageError: the number of heads is not known.
    """
    base = PREFIX if f"{PREFIX}text_embed.weight" in ledger else ""
    patch = ledger.shape(f"{base}vision_embed.proj.weight", 4)
    _map_embeddings(ledger, base, patch[0])
    layers = ledger.count(rf"{re.escape(base)}encoder\.layers\.(\d+)\.")
    sub_norm = f"{base}encoder.layers.0.self_attn.inner_attn_ln.A.weight" in ledger
    for number in range(layers):
        _map_block(ledger, f"{base}encoder.layers.{number}", f"blocks.{number}", patch[0], sub_norm)
    for way, name in WAYS.items():
        ledger.fill_pair(f"norm.{name}", f"{base}encoder.layer_norm.{way}")
    ledger.leave(UNUSED)
    positions = ledger.values["embeddings.image.position"].shape[0]
    return model_config(
        layers=layers,
        dim=patch[0],
        heads=ledger.heads(patch[0], None, HEADS),
        hidden=ledger.shape(f"{base}encoder.layers.0.ffn.A.fc1.weight", 2)[0],
        vl_layers=0,
        patch_size=patch[2],
        image_size=patch[2] * side_of(positions - 1, f"{base}encoder.embed_positions.A.weight"),
        max_text_length=ledger.values["embeddings.text.position"].shape[0],
        attention="per_modality",
        norm="per_modality",
        sub_norm=sub_norm,
        norm_eps=NORM_EPS,
    )


def _map_embeddings(ledger: Ledger, base: str, width: int) -> None:
    image, text = "embeddings.image", "embeddings.text"
    ledger.fill(
        f"{text}.word.weight", f"{base}text_embed.weight", ledger.tensor(f"{base}text_embed.weight", None, width)
    )
    ledger.fill_patches(f"{image}.patch.proj", f"{base}vision_embed.proj")
    ledger.fill_flat(f"{image}.cls", f"{base}vision_embed.cls_token")
    ledger.fill_flat(f"{image}.mask", f"{base}vision_embed.mask_token")
    for way, name in (("A", image), ("B", text)):
        key = f"{base}encoder.embed_positions.{way}.weight"
        ledger.fill(f"{name}.position", key, ledger.tensor(key, None, width)[FIRST_POSITION:])
    ledger.constant("embeddings.kind", torch.zeros(2, width), "0: BEiT-3 has no embedding of the kind")


def _map_block(ledger: Ledger, theirs: str, ours: str, width: int, sub_norm: bool) -> None:
    for way, name in WAYS.items():
        ledger.fill_pair(f"{ours}.norm1.{name}", f"{theirs}.self_attn_layer_norm.{way}")
        ledger.fill_pair(f"{ours}.norm2.{name}", f"{theirs}.final_layer_norm.{way}")
        attention, ffn = f"{ours}.attention.{name}", f"{ours}.ffn.{name}"
        for part, shape in (("weight", (width, width)), ("bias", (width,))):
            keys = [f"{theirs}.self_attn.{letter}_proj.{way}.{part}" for letter in "qkv"]
            ledger.fill(f"{attention}.qkv.{part}", keys, ledger.joined(keys, *shape))
        ledger.fill_pair(f"{attention}.out", f"{theirs}.self_attn.out_proj.{way}")
        ledger.fill_pair(f"{ffn}.up", f"{theirs}.ffn.{way}.fc1")
        ledger.fill_pair(f"{ffn}.down", f"{theirs}.ffn.{way}.fc2")
        if sub_norm:
            ledger.fill_pair(f"{attention}.norm", f"{theirs}.self_attn.inner_attn_ln.{way}")
            ledger.fill_pair(f"{ffn}.norm", f"{theirs}.ffn.{way}.ffn_layernorm")
