"""The pictures inside a report: small, each stored once, and no more than fit."""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlmoe_core.analysis.routing.embed import embedded, plain
from vlmoe_core.analysis.routing.pictures import LikedPatch, TracedExample, TracedLayer

CROP_SIDE = 96
"""Most pixels of a side of a liked patch with its surroundings."""
PICTURE_SIDE = 480
"""Most pixels of a side of a traced picture."""


@dataclass
class Gallery:
    """The pictures of a report, each stored once."""

    pictures: list[str] = field(default_factory=list)
    """Data addresses."""
    patches: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    """Examples and patches that did not fit."""


def hang(patches: Sequence[LikedPatch], examples: Sequence[TracedExample], room: int) -> Gallery:
    """A gallery of at most `room` bytes: all examples, then the patches, every expert's surest first."""
    gallery = Gallery()
    album = _Album(gallery.pictures, room)
    entries = [(_plain_example(example), example.image, PICTURE_SIDE, gallery.examples) for example in examples]
    entries += [(_plain_patch(patch), patch.crop, CROP_SIDE, gallery.patches) for patch in _by_rank(patches)]
    for content, image, side, shown in entries:
        if album.takes(content, image, side):
            shown.append(content)
        else:
            gallery.left_out += 1
    return gallery


class _Album:
    """Pictures as data addresses, each once, while there is room."""

    def __init__(self, addresses: list[str], room: int) -> None:
        self.addresses, self.room = addresses, room
        self._number: dict[str, int] = {}

    def takes(self, content: dict[str, Any], image: Image.Image | None, side: int) -> bool:
        """Whether there is room for the content and its picture; `picture` in it is then the picture's number."""
        address = None if image is None else _address(image, side)
        new = address is not None and address not in self._number
        content["picture"] = None if address is None else self._number.get(address, len(self.addresses))
        need = len(embedded(content)) + 1 + (len(embedded(address)) + 1 if new else 0)  # 1: a comma
        if need > self.room:
            return False
        self.room -= need
        if address is not None and new:
            self._number[address] = len(self.addresses)
            self.addresses.append(address)
        return True


def _address(image: Image.Image, side: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _by_rank(patches: Sequence[LikedPatch]) -> Iterator[LikedPatch]:
    """The surest patch of every expert, then every second one, and so on."""
    seen: Counter[tuple[str, int, int]] = Counter()
    ranked = []
    for patch in sorted(patches, key=lambda patch: -patch.gate):
        expert = (patch.task, patch.layer, patch.expert)
        ranked.append((seen[expert], patch))
        seen[expert] += 1
    yield from (patch for _, patch in sorted(ranked, key=lambda pair: pair[0]))


def _plain_patch(patch: LikedPatch) -> dict[str, Any]:
    """Its box in shares of the crop's sides."""
    width, height = patch.crop.size
    left, top, right, bottom = patch.box
    return {
        "task": patch.task,
        "layer": patch.layer,
        "expert": patch.expert,
        "gate": plain(patch.gate),
        "example": patch.example,
        "place": patch.place,
        "box": [plain(share) for share in (left / width, top / height, right / width, bottom / height)],
    }


def _plain_example(example: TracedExample) -> dict[str, Any]:
    layers = [_plain_layer(layer) for layer in example.layers]
    return {"name": example.name, "task": example.task, "words": list(example.words), "layers": layers}


def _plain_layer(layer: TracedLayer) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "grid": list(layer.grid),
        "patch_experts": list(layer.patch_experts),
        "patch_kept": [int(kept) for kept in layer.patch_kept],
        "word_experts": list(layer.word_experts),
        "word_kept": [int(kept) for kept in layer.word_kept],
    }
