"""manifest.json: every other file of a checkpoint with its size and SHA-256, and how a folder is checked against it."""

import hashlib
import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vlmoe_core.checkpoint.files import listed_files, sha256
from vlmoe_core.checkpoint.layout import MANIFEST, MODEL, OPTIMIZER, TOKENIZERS, step_of
from vlmoe_core.errors import CheckpointError

FORMAT = 1
PARTS = (f"{MODEL}-*.safetensors", f"{OPTIMIZER}-*", f"{TOKENIZERS}/*")
"""What is read as part of a model."""
HEADER_LENGTH = struct.Struct("<Q")
"""A safetensors file starts with the length of its JSON header in 8 bytes."""


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Of all bytes."""
    header_sha256: str | None
    """Of the header of a safetensors file, cheap enough for every read; None for other files."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds, beside the manifest itself."""

    created: int
    """Seconds since 1970."""
    versions: Mapping[str, str]
    """Versions of the libraries that wrote it."""
    files: Mapping[str, FileRecord]
    """Records by path relative to the folder."""


def dump_json(value: Any) -> str:
    """JSON as this room writes it: one spelling for one value, so that a changed byte shows."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_manifest(
    folder: Path, created: int, versions: Mapping[str, str], known: Mapping[str, FileRecord] | None = None
) -> None:
    """Record every file under `folder` in its manifest.json; of those that are known only the size is looked at.

    Raises:
        CheckpointError: a file that is known is not there, or has another size.
    """
    known = known or {}
    files = {name: known.get(name) or record_file(folder / name) for name in listed_files(folder) if name != MANIFEST}
    for name, record in known.items():
        size = (folder / name).stat().st_size if name in files else None
        if size != record.size:
            raise CheckpointError(
                f"{folder / name} was written with {record.size} bytes, but the process that writes {MANIFEST} finds "
                f"{size or 'none'}: the folder must lie on a disk that all machines of the run share"
            )
    (folder / MANIFEST).write_text(manifest_text(Manifest(created, versions, files)), encoding="utf-8")


def manifest_text(manifest: Manifest) -> str:
    """manifest.json of records that are known."""
    files = {name: asdict(record) for name, record in manifest.files.items()}
    body = {"format": FORMAT, "created": manifest.created, "versions": dict(manifest.versions), "files": files}
    return dump_json(body | {"digest": _digest(body)})


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json, which vouches for itself with a digest.

    Raises:
        CheckpointError: it is missing or altered, or its format is newer than this version of vlmoe.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST}")
    data = path.read_bytes()
    altered = CheckpointError(f"{path} has been altered; take this checkpoint from a copy, or use another one")
    try:
        body = json.loads(data)
    except ValueError as error:
        raise altered from error
    if not isinstance(body, dict):
        raise altered
    if isinstance(body.get("format"), int) and body["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {body['format']}, this vlmoe reads {FORMAT}: install a newer vlmoe")
    digest = body.pop("digest", None)
    known = body.get("format") == FORMAT and digest == _digest(body)
    if not known or data != dump_json(body | {"digest": digest}).encode():
        raise altered
    try:
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return Manifest(body["created"], body["versions"], files)
    except (KeyError, TypeError, AttributeError) as error:
        raise altered from error


def foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files under `folder` that the manifest does not list and that should not be there.

    A checkpoint of a run, known by its name, holds nothing else. A model folder may lie in a repository of the Hub
    among a card, results and a report: there only files are foreign that would be read as part of the model.
    """
    foreign = sorted(set(listed_files(folder)) - set(manifest.files) - {MANIFEST})
    if step_of(folder) is not None:
        return foreign
    return [name for name in foreign if any(fnmatch(name, part) for part in PARTS)]


def problem_of(path: Path, record: FileRecord, content: bool) -> str | None:
    """What is wrong with a file, or None.

    Compared are the size, a safetensors header, and all bytes of any other file; with `content` the tensors' bytes too.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record.size:
        return f"has {size} bytes instead of {record.size}: it is truncated or altered"
    if record.header_sha256 is not None and _header_sha256(path) != record.header_sha256:
        return "has a header that is not the one that was written: it is altered"
    if (content or record.header_sha256 is None) and sha256(path) != record.sha256:
        return "has other bytes than were written (its SHA-256 differs): it is altered"
    return None


def check_folder(folder: Path, manifest: Manifest, hashed: Collection[str] = ()) -> None:
    """Refuse a folder that is not, file by file, what its manifest says; of the files `hashed` every byte is read.

    Raises:
        CheckpointError: names the first file that is missing, foreign or altered.
    """
    for name, record in manifest.files.items():
        if problem := problem_of(folder / name, record, content=name in hashed):
            raise CheckpointError(f"{folder / name} {problem}; take this checkpoint from a copy, or use another one")
    for name in foreign_files(folder, manifest):
        raise CheckpointError(f"{folder / name} does not belong to this checkpoint ({MANIFEST} lacks it); remove it")


def record_file(path: Path) -> FileRecord:
    """What a file is now; all its bytes are read."""
    header = _header_sha256(path) if path.suffix == ".safetensors" else None
    return FileRecord(path.stat().st_size, sha256(path), header)


def _header_sha256(path: Path) -> str | None:
    room = path.stat().st_size - HEADER_LENGTH.size
    with path.open("rb") as file:
        start = file.read(HEADER_LENGTH.size)
        if room < 0 or HEADER_LENGTH.unpack(start)[0] > room:
            return None
        return hashlib.sha256(start + file.read(HEADER_LENGTH.unpack(start)[0])).hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(body).encode()).hexdigest()
