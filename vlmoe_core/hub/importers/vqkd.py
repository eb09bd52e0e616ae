"""The visual tokenizers of BEiT v2 (VQ-KD, arXiv 2208.06366), as microsoft/unilm publishes them (beit2/TOKENIZER.md).

A file of its training: encoder and decoder are plain vision transformers, the decoder's patches are the codes.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from vlmoe_core.checkpoint.files import PARTIAL, put_in_place, sync_tree
from vlmoe_core.errors import CheckpointError
from vlmoe_core.hub.importers.ledger import Ledger, listed, model_config, side_of
from vlmoe_core.hub.importers.receipt import Receipt, fates
from vlmoe_core.hub.importers.torch_files import Source
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.vqkd import NO_WORDS, VQKD, CodeHead, FeatureDecoder, VQKDShape

HEADS = {768: 12}
"""Of the published width."""
NORM_EPS = 1e-6
TEACHERS = {512: "openai/clip-vit-base-patch16", 768: "facebook/dino-vitb16"}
"""Of the published files, by the width of their features; no file names its own."""
OTHER_TEACHER = "a model that the imported file does not name"
UNIT = 0.01
"""How far the length of a code may be from 1: half precision is not exact."""

CODES, USE = "quantize.embedding.weight", "quantize.cluster_size"
PAIRS = {
    "encoder.embeddings.image.patch.proj": "encoder.patch_embed.proj",
    "encoder.norm": "encoder.fc_norm",
    "codes.project.0": "encode_task_layer.0",
    "codes.project.2": "encode_task_layer.2",
    "decoder.embed": "decoder.patch_embed.proj",
    "decoder.norm": "decoder.fc_norm",
    "decoder.project.0": "decode_task_layer.0",
    "decoder.project.2": "decode_task_layer.2",
}
"""Weight and bias outside of the blocks."""
SINGLES = {
    "encoder.embeddings.image.cls": "encoder.cls_token",
    "encoder.embeddings.image.position": "encoder.pos_embed",
    "decoder.cls": "decoder.cls_token",
    "decoder.position": "decoder.pos_embed",
    "codes.quantiser.codes_KF": CODES,
    "codes.quantiser.shares_K": USE,
}
BLOCK_PAIRS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.out": "attn.proj",
    "ffn.vision.up": "mlp.fc1",
    "ffn.vision.down": "mlp.fc2",
}
BLOCK_SINGLES = {
    "attention.qkv.weight": "attn.qkv.weight",
    "attention.q_bias": "attn.q_bias",
    "attention.v_bias": "attn.v_bias",
}
UNUSED = {
    r"(loss|teacher|scaling).*": "of the training: its loss, or its teacher",
    r"quantize\.embedding\.(cluster_size|embed_avg|initted)": "how the codes began; what they became is taken",
}


def import_vqkd(source: Source, out: Path, heads: int | None, allow_unknown: bool) -> Receipt:
    """Write a visual tokenizer's folder, new or empty, from a published file, and say what became of every key.

    Args:
        source: the file.
        out: the folder.
        heads: attention heads, where the width is not the published one.
        allow_unknown: leave out keys that are unknown, instead of refusing them.

    Raises:
        CheckpointError: keys are missing, unknown or of another shape, or the disk refuses; nothing is written then.
        UsageError: the number of heads is not known.
    """
    ledger = Ledger(source.tensors, source.config, heads)
    shape = map_vqkd(ledger)
    ledger.close(allow_unknown)
    tensors, origins = ledger.settle(tensors_of(shape), "visual tokenizer")
    notes = (*ledger.notes, _use_of(shape))
    receipt = Receipt("vqkd", source.name, source.hashes, fates(source, ledger), origins, notes)
    _write(VQKD(shape, tensors), receipt, out)
    return receipt


def map_vqkd(ledger: Ledger) -> VQKDShape:
    """Fill the tokenizer from the keys of BEiT v2, and derive its sizes from their shapes.

    Raises:
        CheckpointError: keys are missing, or the shapes make no tokenizer.
        UsageError: the number of heads is not known.
    """
    names = _names(ledger.count(r"encoder\.blocks\.(\d+)\."), ledger.count(r"decoder\.blocks\.(\d+)\."))
    if missing := [key for key in names.values() if key not in ledger]:
        raise CheckpointError(
            f"{len(missing)} keys of a VQ-KD tokenizer are missing in the source: {listed(missing)}; is it another "
            "kind of model, or a part of one?"
        )
    for name, key in names.items():
        ledger.fill(name, key, _value(ledger, key))
    shape = _shape(ledger)
    for name, size in (("kind", (2, shape.model.dim)), ("image.mask", (shape.model.dim,))):
        ledger.constant(f"encoder.embeddings.{name}", torch.zeros(size), "0: a tokenizer of BEiT v2 has none")
    ledger.leave(UNUSED)
    return shape


def tensors_of(shape: VQKDShape) -> dict[str, Tensor]:
    """Names and shapes of a tokenizer's tensors, without values."""
    with torch.device("meta"):
        parts = {"encoder": Encoder(shape.model, NO_WORDS), "codes": CodeHead(shape), "decoder": FeatureDecoder(shape)}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def _names(layers: int, decoder_layers: int) -> dict[str, str]:
    """Our name of each key that a tokenizer of so many blocks is made of."""
    singles, pairs = dict(SINGLES), dict(PAIRS)
    for part, blocks in (("encoder", layers), ("decoder", decoder_layers)):
        for block in (f"{part}.blocks.{number}" for number in range(blocks)):
            singles |= {f"{block}.{ours}": f"{block}.{theirs}" for ours, theirs in BLOCK_SINGLES.items()}
            pairs |= {f"{block}.{ours}": f"{block}.{theirs}" for ours, theirs in BLOCK_PAIRS.items()}
    both = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in pairs.items() for part in ("weight", "bias")}
    return singles | both


def _value(ledger: Ledger, key: str) -> Tensor:
    """The tensor of a key in our shape."""
    if key == "encoder.patch_embed.proj.weight":
        return ledger.tensor(key, None, 3, None, None).flatten(1)
    if key == "decoder.patch_embed.proj.weight":
        return ledger.tensor(key, None, None, 1, 1).flatten(1)
    if key.endswith("cls_token"):
        return ledger.tensor(key, 1, 1, None)[0, 0]
    if key.endswith("pos_embed"):
        return ledger.tensor(key, 1, None, None)[0]
    if key == CODES:
        return _codes(ledger)
    return _shares(ledger) if key == USE else ledger.tensor(key)


def _codes(ledger: Ledger) -> Tensor:
    """Raises CheckpointError for codes that are no unit vectors: those of a training that had not begun are zero."""
    codes_KF = ledger.tensor(CODES, None, None)
    length_K = codes_KF.norm(dim=1)
    if not ((length_K - 1).abs() <= UNIT).all():
        raise CheckpointError(
            f"'{CODES}' has codes of length {length_K.min():.3g} to {length_K.max():.3g}, not unit vectors; is it a "
            "trained VQ-KD tokenizer?"
        )
    return codes_KF


def _shares(ledger: Ledger) -> Tensor:
    """The share of each code, from the moving average of its patches, which a file may have set back to 0."""
    use_K = ledger.tensor(USE, None)
    if use_K.sum() > 0:
        return use_K / use_K.sum()
    ledger.notes.append("the file does not say how often each code is used: equal shares are taken")
    return torch.full_like(use_K, 1 / len(use_K))


def _shape(ledger: Ledger) -> VQKDShape:
    patch = ledger.shape("encoder.patch_embed.proj.weight", 4)
    grid = side_of(ledger.shape("encoder.pos_embed", 3)[1] - 1, "encoder.pos_embed")
    model = model_config(
        modality="vision",
        layers=ledger.count(r"encoder\.blocks\.(\d+)\."),
        dim=patch[0],
        heads=ledger.heads(patch[0], None, HEADS),
        hidden=ledger.shape("encoder.blocks.0.mlp.fc1.weight", 2)[0],
        vl_layers=0,
        patch_size=patch[2],
        image_size=patch[2] * grid,
        qkv_bias="qv",
        norm_eps=NORM_EPS,
        drop_path=0.0,
    )
    codebook_size, code_dim = ledger.shape(CODES, 2)
    width = ledger.shape("decode_task_layer.2.weight", 2)[0]
    teacher = TeacherConfig(model=TEACHERS.get(width, OTHER_TEACHER), dim=width)
    return VQKDShape(model, codebook_size, code_dim, ledger.count(r"decoder\.blocks\.(\d+)\."), teacher)


def _use_of(shape: VQKDShape) -> str:
    recipe = f"{{kind: vqkd, load: FOLDER, codebook_size: {shape.codebook_size}}}"
    grid, teacher = shape.model.grid, shape.teacher
    return (
        f"for models with {grid} x {grid} patches, as tokenizers.visual: {recipe}; its teacher was {teacher.model}, "
        f"{teacher.dim} wide"
    )


def _write(tokenizer: VQKD, receipt: Receipt, out: Path) -> None:
    """Write beside the folder, then rename. Whatever goes wrong leaves nothing behind."""
    partial = out.with_name(out.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer.save(partial)
        receipt.write(partial)
        sync_tree(partial)
        put_in_place(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{out} could not be written: {error}") from error
