"""Tar shards, read in place: WebDataset samples (KEY.jpg with KEY.json or KEY.txt) or classes (CLASS/NAME.jpg).

Nothing is unpacked. The index says where the members of each sample lie, in whatever order they stand. Links are never
followed, and names that climb out of the archive are refused.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import (
    IMAGE_SUFFIXES,
    FilesConfig,
    SliceReader,
    checked_text,
    count_texts,
    decode_utf8,
    find_files,
    is_unsafe,
    label,
    parse_object,
    sound_examples,
    text_values,
    usable_texts,
)
from vlmoe_core.data.index import Columns, Numbering, load_index
from vlmoe_core.errors import DataError

PARTS = ("image", "json", "txt")
BLOCK = tarfile.BLOCKSIZE
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Config(FilesConfig):
    """Tar shards, uncompressed: KEY.jpg with KEY.json or KEY.txt, or CLASS/NAME.jpg."""

    text_field: str = "caption"
    """Field of KEY.json that holds the caption, or a list of captions; without KEY.json, KEY.txt is the caption."""


@dataclass
class TarSample:
    """The members of one key."""

    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """First byte and size of `image`, `json`, `txt`."""
    problem: str = ""
    """Why the sample can't be used."""
    spare_image: str = ""
    """A picture whose name has two dots (KEY.mask.png): it is passed over if there is a KEY.jpg too."""


class TarSource:
    """The examples of tar shards."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        self._field = config.text_field
        self._stream = context.stream
        self._root = context.root
        files = find_files(config.path, context.root)
        self._index = load_index(files, "tar-1", (config.text_field,), lambda path: index_tar(path, config.text_field))
        texts = self._index.columns["texts"]
        counts = np.ones_like(texts) if context.stream == "image" else texts
        self._numbering = Numbering(counts)
        self.blocks = self._index.blocks(counts)
        self._reader = SliceReader()

    def __len__(self) -> int:
        return len(self._numbering)

    def __getitem__(self, index: int) -> Example:
        """The example of that number; DataError, with tar and key, if it is broken."""
        example = self._described(index)
        if self._stream == "text":
            return example
        record, _ = self._numbering.locate(index)
        image = self._part(record, "image", example.name)
        if image is None:
            raise DataError(f"{example.name}: has no picture (a member with this name and an ending such as .jpg)")
        return replace(example, image=image)

    def texts(self) -> Iterator[str]:
        """Every caption, in stored order; broken ones are left out."""
        for record in range(len(self._index)):
            try:
                values = [] if self._index.columns["problem"][record] else self._texts(record, self._where(record))
            except DataError:
                continue
            yield from usable_texts(values)

    def records(self) -> Iterator[Example]:
        """Every example once, without its picture; broken ones are left out."""
        return sound_examples(self._described, len(self))

    def _described(self, index: int) -> Example:
        """The example of that number, less its picture."""
        record, nth = self._numbering.locate(index)
        where = self._where(record)
        problem = _decode(self._index.columns["problem"][record])
        if problem:
            raise DataError(f"{where}: {problem}")
        text = None
        if self._stream != "image":
            text = checked_text(self._texts(record, where)[nth], self._field, where)
        if self._stream == "text":
            return Example(where, text=text)
        key = _decode(self._index.columns["key"][record])
        folder = PurePosixPath(key).parent.as_posix()
        facts = {"id": key} | ({} if folder == "." else {"label": folder})
        return Example(where, text=text, image_id=record, facts=facts)

    def _where(self, record: int) -> str:
        return f"{label(self._index.path(record), self._root)}:{_decode(self._index.columns['key'][record])}"

    def _part(self, record: int, part: str, where: str) -> bytes | None:
        start, size = (int(self._index.columns[f"{part}_{what}"][record]) for what in ("start", "size"))
        return None if start < 0 else self._reader.read(self._index.path(record), start, size, where)

    def _texts(self, record: int, where: str) -> list[object]:
        described = self._part(record, "json", where)
        plain = self._part(record, "txt", where)
        if described is not None:
            return text_values(parse_object(described, f"{where}.json"), self._field, f"{where}.json")
        if plain is None:
            raise DataError(f"{where}: has neither a .json nor a .txt with its caption")
        return [decode_utf8(plain, f"{where}.txt").strip()]


def index_tar(path: Path, text_field: str) -> Columns:
    """Columns key, problem (bytes), texts (captions), and start and size of each part (-1 where it is missing)."""
    samples = read_samples(path)
    columns: Columns = {
        "key": _bytes_column(list(samples)),
        "problem": _bytes_column([sample.problem for sample in samples.values()]),
    }
    for part in PARTS:
        places = np.array([sample.parts.get(part, (-1, -1)) for sample in samples.values()], dtype=np.int64)
        columns[f"{part}_start"], columns[f"{part}_size"] = places.reshape(-1, 2).T
    reader = SliceReader()
    counts = [_count_texts(sample, reader, path, text_field) for sample in samples.values()]
    columns["texts"] = np.array(counts, dtype=np.int64)
    return columns


def _count_texts(sample: TarSample, reader: SliceReader, path: Path, text_field: str) -> int:
    """Captions of a sample; 1 where that can't be told: one example that raises."""
    if sample.problem or "json" not in sample.parts:
        return 1
    return count_texts(reader.read(path, *sample.parts["json"], str(path)), text_field)


def read_samples(path: Path) -> dict[str, TarSample]:
    """The samples of a shard by key, in the order in which their keys first appear.

    What is damaged, cut or refused is a sample with a problem: a shard never hides that a part of it can't be read.
    """
    samples: dict[str, TarSample] = {}
    size = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                _add_member(samples, member, size)
                end = member.offset_data + _padded(member.size)
            end = archive.offset
        damage = _damage_at(path, end, size)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        damage = _damage(path, error)
    cut = any(sum(place) > size for sample in samples.values() for place in sample.parts.values())
    if damage and not cut:
        samples[f"byte {end}"] = TarSample(problem=damage)
    for sample in samples.values():
        sample.problem = sample.problem or _lacking(sample)
    return samples


def _add_member(samples: dict[str, TarSample], member: tarfile.TarInfo, archive_size: int) -> None:
    """Note where a member lies, or why it is refused. Folders, hidden files and other endings are passed over."""
    refusal = _refusal(member)
    path = PurePosixPath(member.name)
    stem, _, ending = path.name.partition(".")
    part = "image" if ending.lower() in IMAGE_SUFFIXES else ending.lower()
    spare_image = ending.lower().rpartition(".")[2] in IMAGE_SUFFIXES
    if not refusal and (member.isdir() or not stem or not (part in PARTS or spare_image)):
        return
    sample = samples.setdefault(path.name if is_unsafe(member.name) else (path.parent / stem).as_posix(), TarSample())
    if refusal:
        sample.problem = refusal
    elif part not in PARTS:
        sample.spare_image = member.name
    elif part in sample.parts:
        sample.problem = f"this key stands in the archive more than once (again as {member.name})"
    else:
        sample.parts[part] = (member.offset_data, member.size)
        if member.offset_data + member.size > archive_size:
            sample.problem = f"{member.name} is cut: the archive ends inside it, at byte {archive_size}"


def _refusal(member: tarfile.TarInfo) -> str:
    if is_unsafe(member.name):
        return f"the member '{member.name}' has a name that leads out of the archive, and is refused"
    if member.issym() or member.islnk():
        return f"the member {member.name} is a link to '{member.linkname}', and links are not followed"
    if member.issparse() or not (member.isreg() or member.isdir()):
        return f"the member {member.name} is not a plain file, and is refused"
    return ""


def _lacking(sample: TarSample) -> str:
    if sample.spare_image and "image" not in sample.parts:
        return f"{sample.spare_image} has two dots; a key ends at the first, so this is not KEY.jpg: rename it"
    return ""


def _damage_at(path: Path, end: int, size: int) -> str:
    """What is wrong behind the last member: a sound archive ends there, or goes on with zeros."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(BLOCK)
    if rest.strip(b"\0"):
        return f"the archive is damaged or cut here: {size - end} bytes can't be read"
    return ""


def _damage(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        return "the file is empty (0 bytes), no tar archive"
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return f"the archive is compressed with {name}; shards are read in place, so unpack it to a plain .tar"
    return f"the archive is damaged or cut ({error})"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _bytes_column(values: list[str]) -> NDArray[np.bytes_]:
    return np.array([value.encode("utf-8", "surrogateescape") for value in values], dtype="S")


def _decode(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def open_source(config: Config, context: SourceContext) -> TarSource:
    """The shards that `config.path` names."""
    return TarSource(config, context)
