"""Finds the file that holds a text tokenizer: given by path, in a folder, or on the Hub."""

from pathlib import Path

from vlmoe_core.errors import HubError, TokenizerError, UsageError
from vlmoe_core.hf import Address, first_file, is_hub

FILES = ("tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
SUFFIXES = (".json", ".txt", ".spm", ".model")


def tokenizer_file(spec: str) -> Path:
    """The tokenizer file that `spec` names: a file, a folder with one, or a Hub name `ORG/NAME[@revision]`.

    Raises TokenizerError if there is none, or if the Hub can't be reached.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise TokenizerError(f"{path} has an unknown ending; a text tokenizer is one of *{', *'.join(SUFFIXES)}")
        return path
    if path.suffix in SUFFIXES or not _is_hub_name(spec):
        raise TokenizerError(
            f"text tokenizer {spec} is not there; give a tokenizer.json, vocab.txt, .spm or .model file"
        )
    return _on_hub(spec)


def _in_folder(folder: Path) -> Path:
    named = [folder / name for name in FILES if (folder / name).is_file()]
    if named:
        return named[0]
    others = sorted(p for p in folder.iterdir() if p.suffix in (".spm", ".model"))
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(p.name for p in others)
        raise TokenizerError(f"{folder} holds several SentencePiece models ({names}); name one")
    raise TokenizerError(f"{folder} holds no text tokenizer; looked for {', '.join(FILES)} and *.spm")


def _is_hub_name(spec: str) -> bool:
    return is_hub(spec) or (spec[:1] not in ("/", ".", "~", "") and spec.count("/") <= 1)


def _on_hub(spec: str) -> Path:
    try:
        found = first_file(spec, FILES)
    except (HubError, UsageError) as error:
        raise TokenizerError(
            f"text tokenizer {spec} is no file or folder here, and {error}; or give the path of a downloaded tokenizer"
        ) from error
    if found is None:
        name = Address.parse(spec).repo
        raise TokenizerError(f"Hub model {name} holds no text tokenizer; looked for {', '.join(FILES)}")
    return found
