"""Reads a SentencePiece model (.spm, .model) into a `tokenizers.Tokenizer`, without the sentencepiece package.

The format is the protobuf message ModelProto of sentencepiece_model.proto (google/sentencepiece). Only the fields named
here are read. Text that spells a control piece out, such as "<s>", is given that piece; sentencepiece would cut it up.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from vlmoe_core.errors import TokenizerError

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


@dataclass(frozen=True)
class SentencePieceModel:
    """What of a ModelProto decides how a text is encoded. The defaults are those of the .proto file."""

    pieces: tuple[tuple[str, float, int], ...]
    """Spelling, score and type of each piece, in the order of their ids."""
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    space_is_suffix: bool = False
    charsmap: bytes = b""
    """Precompiled map of characters to their normal form; empty: none."""
    add_dummy_prefix: bool = True
    remove_extra_spaces: bool = True
    escape_spaces: bool = True


def read_spm(path: Path) -> Tokenizer:
    """A Unigram or BPE tokenizer that encodes as the SentencePiece model does.

    Raises TokenizerError if the file is not such a model, or one of another kind (word, char).
    """
    try:
        model = _parse_model(path.read_bytes())
    except (IndexError, ValueError, struct.error) as error:
        raise TokenizerError(
            f"{path} is not a SentencePiece model ({error}); give one as sentencepiece writes it"
        ) from error
    if model.model_type not in (UNIGRAM, BPE) or model.space_is_suffix or not model.escape_spaces:
        raise TokenizerError(
            f"{path} is neither Unigram nor BPE with spaces as prefixes; convert it to a tokenizer.json"
        )
    try:
        return _build(model)
    except Exception as error:  # the tokenizers package raises bare Exception
        raise TokenizerError(f"{path}: the SentencePiece model can't be used ({error})") from error


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] | None = None
    normalizer: dict[int, int | bytes] | None = None
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is not a message")
        if number == 1:
            pieces.append(_parse_piece(dict(_fields(_as_bytes(value)))))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if trainer is None or normalizer is None:
        raise ValueError("its settings are missing")
    if not any(kind == UNKNOWN for _, _, kind in pieces):
        raise ValueError("no piece stands for unknown text")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_as_int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        space_is_suffix=bool(trainer.get(24, 0)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_spaces=bool(normalizer.get(4, 1)),
        escape_spaces=bool(normalizer.get(5, 1)),
    )


def _parse_piece(fields: dict[int, int | bytes]) -> tuple[str, float, int]:
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, bytes(4))))
    return _as_bytes(fields[1]).decode("utf-8"), score, _as_int(fields.get(3, NORMAL))


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where bytes should")
    return value


def _as_int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes stand where a number should")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message; fixed-width values come as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if number == 0 or at + size > len(data):
            raise ValueError(f"it ends inside a field at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _build(model: SentencePieceModel) -> Tokenizer:
    unk_id = next(i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    if model.model_type == UNIGRAM:
        scores = [(piece, score) for piece, score, _ in model.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=unk_id, byte_fallback=model.byte_fallback))
    else:
        tokenizer = Tokenizer(_bpe(model, unk_id))
    tokenizer.normalizer = _normalizer(model)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else steps)
    special = [p for p, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in special])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p, _, kind in model.pieces if kind == USER_DEFINED])
    return tokenizer


def _bpe(model: SentencePieceModel, unk_id: int) -> models.BPE:
    """Every way to join two pieces into a third is a merge, those of the highest score first."""
    ids = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    joined = sorted((i for i, p in enumerate(model.pieces) if p[2] == NORMAL), key=lambda i: (-model.pieces[i][1], i))
    merges: list[tuple[str, str]] = []
    for piece in (model.pieces[i][0] for i in joined):
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in ids and right in ids]
    unk = model.pieces[unk_id][0]
    return models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=model.byte_fallback)


def _normalizer(model: SentencePieceModel) -> normalizers.Sequence:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_spaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
