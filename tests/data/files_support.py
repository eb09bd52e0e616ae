"""What the tests of the file sources share."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmoe_core.config import plugin_module
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Source, SourceContext, TextEncoder

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")


class WordEncoder:
    """One token a word; words of more than 10 letters have one token for each 10."""

    vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id = 10, 0, 1, 2, 3, 4

    def __init__(self, fingerprint: str = "words") -> None:
        self.fingerprint = fingerprint

    def encode(self, text: str) -> list[int]:
        return [5 for word in text.split() for _ in range(0, len(word), 10)]


def open_source(
    root: Path, stream: StreamName, max_text: int = 64, encoder: TextEncoder | None = None, **fields: Any
) -> Source:
    """The source that a recipe entry with these fields opens."""
    module = plugin_module("vlmoe_core.data.sources", fields["source"])
    source: Source = module.open_source(
        module.Config.model_validate(fields), SourceContext(stream, root, max_text, encoder)
    )
    return source


def jpeg(color: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))
