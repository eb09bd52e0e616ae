"""`vlmoe import`: an encoder from the weights of BEiT-3, VLMo, BEiT or BERT, a visual tokenizer from those of VQ-KD."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.hub.importers.receipt import Receipt

EXAMPLES = (
    "vlmoe import beit3 beit3_base_patch16_224.pth --tokenizer beit3.spm --out models/beit3",
    "vlmoe import beit hf-hub:microsoft/beit-base-patch16-224-pt22k --image-size 384 --out models/beit-384",
    "vlmoe import vlmo vlmo_base_patch16_224.pt --tokenizer vocab.txt --out models/vlmo",
    "vlmoe import bert hf-hub:google-bert/bert-base-uncased --out models/bert-words",
    "vlmoe import vqkd vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth --out models/vqkd",
)


def import_weights(
    family: Annotated[
        str, typer.Argument(metavar="beit3|vlmo|beit|bert|vqkd", help="Kind of weights.", show_default=False)
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .pth, .pt, .bin, .ckpt or .safetensors file, a transformers folder, or hf-hub:ORG/NAME[@REV].",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder that is written, new or empty.", show_default=False)],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|hf-hub:ORG/NAME",
            help="Text tokenizer of the weights (beit3.spm; vocab.txt); a transformers folder brings its own.",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Resample the positions to images of N pixels.", show_default=False),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Attention heads, where the weights are of no published size.", show_default=False
        ),
    ] = None,
    imagenet_pixels: Annotated[
        bool,
        typer.Option(
            "--imagenet-pixels", help="The weights saw pixels normalised with ImageNet's mean and deviation (BEiT v2)."
        ),
    ] = False,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Leave out keys that are unknown, instead of refusing them.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Make a model folder of other people's weights, for pretrain --model and finetune --model.

    Loads tensors only: a file that holds code is refused. Every key is used, or named as unused with the reason, in the
    folder's import.json. From BERT come the tokenizer and the word embeddings only. Of vqkd (the tokenizers of BEiT v2)
    it makes the folder of a visual tokenizer, for tokenizers.visual.load.
    """
    from dataclasses import asdict

    from vlmoe_core.hub.importers.importing import ImportOptions, import_model

    options = ImportOptions(image_size, heads, tokenizer, imagenet_pixels, allow_unknown)
    receipt = import_model(family, source, out, options)
    printed = Output(json)
    printed.record(_facts(receipt, out))
    printed.table([{"unused keys": count, "reason": reason} for reason, count in receipt.unused.items()], "\nunused")
    printed.table([{"new tensors": count, "reason": reason} for reason, count in receipt.new.items()], "\nnew: random")
    printed.data(asdict(receipt))
    for note in receipt.notes:
        printed.note(note)


def _facts(receipt: "Receipt", out: Path) -> dict[str, object]:
    unused, new = sum(receipt.unused.values()), sum(receipt.new.values())
    return {
        "visual tokenizer" if receipt.family == "vqkd" else "model": str(out),
        "source": f"{receipt.source} ({receipt.family})",
        "keys": f"{len(receipt.keys) - unused:,} used, {unused:,} unused",
        "tensors": f"{len(receipt.tensors) - new:,} filled, {new:,} new",
        "every key": str(out / "import.json"),
    }
