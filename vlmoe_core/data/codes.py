"""Visual tokens that were stored once, keyed by the position of a sample and a checksum of its crop.

A folder holds `tokens.json` and, for each split and stream, shards of consecutive positions:
`train-image-00000.safetensors` with `codes` (N, P), uint16 or int32, and `crops` (N,), int64. A position whose example
is broken has the crop -1.

Axis letters: N positions of a shard, P patches of an image.
"""

import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.errors import TokenizerError

FORMAT = 1
TOKENS_FILE = "tokens.json"
BROKEN = -1
CROP_BYTES = 8
ONLINE = "set tokenizers.visual.tokens=null to encode in the step"


@dataclass(frozen=True)
class Part:
    """The stored positions of one stream of a split: 0 to `positions` - 1."""

    split: str
    """train or eval."""
    stream: StreamName
    """image or pair."""
    positions: int
    """How many."""
    per_file: int
    """Positions of a shard; the last one may have fewer."""

    @property
    def name(self) -> str:
        """Split and stream."""
        return f"{self.split}-{self.stream}"

    @property
    def num_files(self) -> int:
        """Shards."""
        return -(-self.positions // self.per_file)

    def file(self, number: int) -> str:
        """The name of a shard."""
        return f"{self.name}-{number:05d}.safetensors"

    def span(self, number: int) -> range:
        """The positions of a shard."""
        return range(number * self.per_file, min((number + 1) * self.per_file, self.positions))


@dataclass(frozen=True)
class Manifest:
    """What was stored, and with which tokenizer."""

    fingerprint: str
    """The tokenizer's."""
    precision: Literal["fp32", "bf16"]
    """Its arithmetic."""
    image_size: int
    """Pixels along an image's side."""
    patches: int
    """P."""
    codes: int
    """Codes that the tokenizer knows."""
    parts: tuple[Part, ...]
    """Every stream with images of the training and the held-out data."""

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]] | type[np.signedinteger[Any]]:
        """The type in which codes are stored."""
        return np.uint16 if self.codes <= 2**16 else np.int32

    @property
    def positions(self) -> int:
        """All positions."""
        return sum(part.positions for part in self.parts)

    @property
    def row_bytes(self) -> int:
        """Disk that a position needs."""
        return self.patches * np.dtype(self.dtype).itemsize + CROP_BYTES

    def find(self, split: str, stream: StreamName) -> Part | None:
        """The part of that stream, if it was stored."""
        return next((p for p in self.parts if (p.split, p.stream) == (split, stream)), None)

    def differences(self, other: "Manifest") -> str:
        """The fields that differ, with both values."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        return "; ".join(f"{name} {_shown(mine)}, not {_shown(theirs)}" for name, (mine, theirs) in differing.items())

    def write(self, path: Path) -> None:
        """Write it as a file."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")


def _shown(value: object) -> str:
    """A value of a manifest in a message."""
    if isinstance(value, tuple):
        return ", ".join(f"{p.positions:,} positions of {p.name}" for p in value)
    return str(value)


def read_manifest(folder: Path) -> Manifest:
    """What a folder of stored tokens says of itself; TokenizerError if it is none, or a newer one."""
    path = folder / TOKENS_FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said.pop("format") != FORMAT:
            raise TokenizerError(f"{path} has another format than {FORMAT}; use a newer vlmoe")
        return Manifest(**{**said, "parts": tuple(Part(**part) for part in said["parts"])})
    except FileNotFoundError as error:
        raise TokenizerError(
            f"{folder} holds no stored tokens ({TOKENS_FILE} is not there); make them with vlmoe data tokenize RECIPE "
            f"--out {folder}, or {ONLINE}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenizerError(f"{path} can't be read ({error}); store the tokens anew in another folder") from error


def crop_of(pictures: Sequence[NDArray[np.uint8]]) -> int:
    """CRC-32 of the pixels of a sample's pictures (3, height, width), as they are encoded."""
    value = 0
    for picture in pictures:
        value = zlib.crc32(np.ascontiguousarray(picture).data, value)
    return value


def write_shard(path: Path, codes_NP: NDArray[Any], crops_N: NDArray[np.int64]) -> None:
    """Write the codes and crops of consecutive positions."""
    path.write_bytes(save({"codes": codes_NP, "crops": crops_N}))


def is_whole(folder: Path, part: Part, number: int, patches: int) -> bool:
    """Whether a shard is there, and not cut off or of another shape."""
    try:
        Shard(folder / part.file(number), part.span(number), patches)
    except TokenizerError:
        return False
    return True


class Shard:
    """One file, memory-mapped."""

    def __init__(self, path: Path, positions: range, patches: int) -> None:
        """Map the file. Raises TokenizerError if it is missing, damaged or of another shape."""
        self.positions = positions
        try:
            file: Any = safe_open(path, "numpy")
            self._codes, self._crops = file.get_slice("codes"), file.get_slice("crops")
            shapes = [list(part.get_shape()) for part in (self._codes, self._crops)]
        except FileNotFoundError as error:
            raise TokenizerError(
                f"{path} is not there: the tokens were not all stored; give vlmoe data tokenize again, which goes on"
            ) from error
        except (OSError, SafetensorError) as error:
            raise TokenizerError(
                f"{path} is damaged ({error}); give vlmoe data tokenize again, which makes it anew"
            ) from error
        if shapes != [[len(positions), patches], [len(positions)]]:
            raise TokenizerError(f"{path} holds other shapes than {TOKENS_FILE} says; remove it and store it anew")

    def crop(self, position: int) -> int:
        """The checksum of what was encoded; -1: the example was broken."""
        row = position - self.positions.start
        return int(self._crops[row : row + 1][0])

    @property
    def num_broken(self) -> int:
        """Positions whose examples were broken."""
        return int((self._crops[:] == BROKEN).sum())

    def codes(self, position: int) -> NDArray[np.int64]:
        """(P,) at a position."""
        row = position - self.positions.start
        codes_P: NDArray[np.int64] = self._codes[row : row + 1][0].astype(np.int64)
        return codes_P


class StoredCodes:
    """The codes of one part. Each process maps the shards anew, when it needs them."""

    def __init__(self, folder: Path, part: Part, patches: int) -> None:
        self.folder, self.part, self.patches = folder, part, patches
        self._shard: Shard | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "part": self.part, "patches": self.patches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def shards(self) -> Iterator[Shard]:
        """Every shard, opened. Raises TokenizerError for one that is missing or damaged."""
        return (self._open(number) for number in range(self.part.num_files))

    def check(self) -> None:
        """Raises TokenizerError for a shard that is missing or damaged."""
        deque(self.shards(), maxlen=0)

    def of(self, sample: Sample) -> NDArray[np.int64]:
        """(P,) of a sample with a picture. Raises TokenizerError if the codes at its position are of another crop."""
        assert sample.pixels is not None, "only streams with images have codes"
        shard = self._shard_of(sample.position)
        if shard.crop(sample.position) != crop_of((sample.pixels, *sample.more_pixels)):
            raise TokenizerError(
                f"{self.folder}: the codes at position {sample.position} of the {self.part.stream} stream "
                f"({self.part.split}) are of other pixels than those of {sample.name} there: data, seed, augmentation "
                f"or Pillow differ from when they were stored; store them anew (vlmoe data tokenize), or {ONLINE}"
            )
        return shard.codes(sample.position)

    def _shard_of(self, position: int) -> Shard:
        """Positions come in order, so one shard at a time is open."""
        if position >= self.part.positions:
            raise TokenizerError(
                f"{self.folder} holds {self.part.positions:,} positions of {self.part.name}, not position {position:,}"
            )
        if self._shard is None or position not in self._shard.positions:
            self._shard = self._open(position // self.part.per_file)
        return self._shard

    def _open(self, number: int) -> Shard:
        return Shard(self.folder / self.part.file(number), self.part.span(number), self.patches)
