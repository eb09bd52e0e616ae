"""From the words of the command line to what an export is asked for."""

import re
from pathlib import Path

from vlmoe_core.config import nearest
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.export.formats import DTYPES, FORMATS, WriteOptions
from vlmoe_core.hub.export.run import ExportRequest
from vlmoe_core.hub.export.shrink import Cut

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
QUANTIZED = ("int8",)


def make_request(
    format: str,
    out: Path,
    dtype: str | None,
    quantize: str | None,
    modality: str | None,
    experts: str | None,
    removed: str,
    data: str | None,
    max_shard_size: str | None,
    visual: bool,
) -> ExportRequest:
    """The request that the words make. Raises UsageError for a word that is none."""
    _known("--format", format, FORMATS)
    _known("--dtype", dtype, DTYPES)
    _known("--quantize", quantize, QUANTIZED)
    most = None if max_shard_size is None else bytes_of(max_shard_size)
    write = WriteOptions(dtype, quantize is not None, most, visual)
    return ExportRequest(format, out, write, Cut.parse(modality, experts, removed), data)  # type: ignore[arg-type]


def bytes_of(size: str) -> int:
    """Bytes of a size such as 500MB, 2GB or 1GiB. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise UsageError(f"--max-shard-size {size}: give a size such as 500MB, 2GB or 1GiB")
    return int(float(found[1]) * unit)


def _known(option: str, word: str | None, known: object) -> None:
    words = list(known)  # type: ignore[call-overload]
    if word is not None and word not in words:
        raise UsageError(f"{option} {word}: {nearest(word, words)}")
