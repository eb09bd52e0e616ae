"""Makes a model folder of somebody else's weights: BEiT-3, VLMo, BEiT or BERT; of VQ-KD's a visual tokenizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import refuse_filled, write_model
from vlmoe_core.errors import TokenizerError, UsageError
from vlmoe_core.hub.importers.beit import map_beit
from vlmoe_core.hub.importers.beit3 import map_beit3
from vlmoe_core.hub.importers.bert import map_bert
from vlmoe_core.hub.importers.fairseq_ids import read_fairseq_spm
from vlmoe_core.hub.importers.ledger import Ledger
from vlmoe_core.hub.importers.pixels import fold_pixels
from vlmoe_core.hub.importers.receipt import Receipt, fates
from vlmoe_core.hub.importers.resample import resample
from vlmoe_core.hub.importers.torch_files import Source, open_source
from vlmoe_core.hub.importers.vlmo import map_vlmo
from vlmoe_core.hub.importers.vqkd import import_vqkd
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.config import ModelRecipe
from vlmoe_core.recipe.load import dump_recipe
from vlmoe_core.tokenizers.config import TextTokenizerConfig, TokenizersConfig
from vlmoe_core.tokenizers.locate import FILES, tokenizer_file
from vlmoe_core.tokenizers.text import TextTokenizer, load_text_tokenizer, wordless_tokenizer

WORDS = "embeddings.text.word.weight"
SEED = 0
"""Of the tensors that stay as they were initialised."""


@dataclass(frozen=True)
class Family:
    """One kind of weights."""

    map: Callable[[Ledger], ModelConfig]
    """Fills the encoder."""
    tokenizer: str | None
    """The text tokenizer that belongs to it; null: it reads no text."""


FAMILIES: Mapping[str, Family] = {
    "beit3": Family(map_beit3, "beit3.spm"),
    "vlmo": Family(map_vlmo, "the vocab.txt of bert-base-uncased"),
    "beit": Family(map_beit, None),
    "bert": Family(map_bert, "its vocab.txt or tokenizer.json"),
}

TOKENIZER = "vqkd"
"""The kind of weights that are no encoder but a visual tokenizer."""
KNOWN = ", ".join((*FAMILIES, TOKENIZER))


@dataclass(frozen=True)
class ImportOptions:
    """What the source does not say, and what is wanted of it."""

    image_size: int | None = None
    """Positions are resampled to images of so many pixels; null: they stay."""
    heads: int | None = None
    """Attention heads, where no tensor shows them."""
    tokenizer: str | None = None
    """File, folder or Hub name of the text tokenizer."""
    imagenet_pixels: bool = False
    """The source saw pixels normalised with ImageNet's mean and deviation."""
    allow_unknown: bool = False
    """Keys that are unknown are left out instead of refused."""


def import_model(family: str, spec: str, out: Path, options: ImportOptions = ImportOptions()) -> Receipt:
    """Read weights, write a model's or visual tokenizer's folder with them, and say what became of every key.

    Args:
        family: beit3, vlmo, beit, bert or vqkd.
        spec: a file, a transformers folder, or `hf-hub:ORG/NAME[@rev]`.
        out: a folder that is new or empty.
        options: see there.

    Raises:
        UsageError: a name or an option can't be right, or the folder is in use.
        CheckpointError: the weights are damaged, hold code, or are of another kind; nothing is written then.
        TokenizerError: the tokenizer is missing or has more ids than the word embedding has rows.
    """
    if family not in (*FAMILIES, TOKENIZER):
        raise UsageError(f"there is no importer for {family}; known: {KNOWN}")
    refuse_filled(out)
    if family == TOKENIZER:
        return _import_tokenizer(spec, out, options)
    source = open_source(spec)
    _check_kind(family, source)
    ledger = Ledger(source.tensors, source.config, options.heads)
    config = FAMILIES[family].map(ledger)
    ledger.close(options.allow_unknown)
    notes = ledger.notes + fold_pixels(ledger, source, options.imagenet_pixels)
    config, resampled = resample(ledger, config, options.image_size)
    text = _text_tokenizer(family, source, options.tokenizer)
    rows = ledger.values[WORDS].shape[0] if WORDS in ledger.values else max(16, text.vocab_size)
    notes += [*resampled, *_check_words(text, rows)]
    state, tensors = assemble(config, rows, ledger)
    tokenizers = TokenizersConfig(text=TextTokenizerConfig(vocab_size=rows))
    recipe = dump_recipe(ModelRecipe(model=config, tokenizers=tokenizers))

    def save_text(folder: Path) -> None:
        text.save(folder / "text")

    receipt = Receipt(family, source.name, source.hashes, fates(source, ledger, "encoder."), tensors, tuple(notes))
    write_model(out, state, RunState(step=0, positions={}), recipe, save_text, more=receipt.write)
    return receipt


def _import_tokenizer(spec: str, out: Path, options: ImportOptions) -> Receipt:
    unfit = {
        "--tokenizer": options.tokenizer,
        "--image-size": options.image_size,
        "--imagenet-pixels": options.imagenet_pixels,
    }
    if given := [name for name, value in unfit.items() if value]:
        raise UsageError(
            f"{', '.join(given)}: a visual tokenizer keeps its pixels and positions and reads no text; leave out"
        )
    source = open_source(spec)
    if source.folder is not None:
        raise UsageError(f"{spec} is a folder; a VQ-KD tokenizer is published as one .pth file")
    return import_vqkd(source, out, options.heads, options.allow_unknown)


def _check_kind(family: str, source: Source) -> None:
    kind = source.config.get("model_type", family)
    if source.folder is not None and kind != family:
        raise UsageError(f"config.json says model_type: {kind}, not {family}; importers there are for {KNOWN}")


def _text_tokenizer(family: str, source: Source, spec: str | None) -> TextTokenizer:
    """The tokenizer that was named, or came along with a folder; special tokens alone for weights that read no text."""
    wanted = FAMILIES[family].tokenizer
    if spec is None and source.folder is not None and any((source.folder / name).is_file() for name in FILES):
        spec = str(source.folder)
    if spec is None and wanted is None:
        return wordless_tokenizer()
    if spec is None:
        raise UsageError(f"{family} reads texts, and no tokenizer came along: give --tokenizer ({wanted})")
    if family == "beit3" and (path := tokenizer_file(spec)).suffix in (".spm", ".model"):
        return TextTokenizer(read_fairseq_spm(path))
    return load_text_tokenizer(spec)


def _check_words(text: TextTokenizer, rows: int) -> list[str]:
    """Raises TokenizerError if the tokenizer has more ids than there are rows; what is worth knowing of the two."""
    if text.vocab_size > rows:
        raise TokenizerError(
            f"the text tokenizer has {text.vocab_size} ids, more than the {rows} rows of the word embedding: it is not "
            "the one that these weights were trained with; name that with --tokenizer"
        )
    fewer = rows - text.vocab_size
    return [*text.notes, *([f"{fewer} of {rows} rows of the word embedding have no token"] if fewer else [])]


def assemble(config: ModelConfig, rows: int, ledger: Ledger) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The encoder's state under the names of a whole model, and where each tensor is from.

    Raises CheckpointError for a tensor that has neither a key nor a reason to be new, or a key of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        state = Encoder(config, rows).state_dict()
    filled, origins = ledger.settle(state, "encoder")
    return {f"encoder.{name}": t for name, t in filled.items()}, {f"encoder.{name}": o for name, o in origins.items()}
