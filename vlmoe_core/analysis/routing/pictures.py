"""What is shown of a trace: the patches that each expert likes most, and a few examples with their experts.

Axis letters: T tokens of the images, I images, U different pictures, E experts, R ranks of a picture, C channels, H
height, W width.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlmoe_core.analysis.routing.tokens import VISION_KINDS, stream_of
from vlmoe_core.analysis.routing.trace import Rows, Trace
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.encoder import Encoded

NONE = -1.0
"""Below any gate."""


@dataclass(frozen=True)
class LikedPatch:
    """A patch whose first choice was the expert, with a large gate."""

    task: str
    """mlm, mim, vlm in pretraining; else the downstream task."""
    layer: int
    """0-based block."""
    expert: int
    """Number of the expert."""
    gate: float
    """Its gate."""
    example: str
    """Where the picture comes from."""
    place: int
    """0-based number of the patch, by rows."""
    crop: Image.Image
    """The patch and its neighbours on all sides, as far as the picture goes (RGB)."""
    box: tuple[int, int, int, int]
    """The patch inside the crop, in pixels: left, top, right, bottom; the last two lie behind it."""


@dataclass(frozen=True)
class TracedLayer:
    """First choices of one example in one sparse layer; empty for a modality that has no experts there."""

    layer: int
    """0-based block."""
    grid: tuple[int, int]
    """Rows and columns of patches; (0, 0) without a picture."""
    patch_experts: tuple[int, ...]
    """By rows, masked patches included."""
    patch_kept: tuple[bool, ...]
    """Whether the expert had a place for the patch."""
    word_experts: tuple[int, ...]
    """In the order of the text."""
    word_kept: tuple[bool, ...]
    """Whether the expert had a place for the token."""


@dataclass(frozen=True)
class TracedExample:
    """One sequence, and where its tokens went."""

    name: str
    """Where it comes from."""
    task: str
    """mlm, mim, vlm in pretraining; else the downstream task."""
    image: Image.Image | None
    """The picture as the model was given it, masked patches in sight (RGB)."""
    words: tuple[str, ...]
    """Pieces of the text in order, [CLS] and [SEP] included, as the model saw them."""
    layers: tuple[TracedLayer, ...]
    """From the first sparse layer on."""


class Place(NamedTuple):
    """What patches are kept for."""

    task: str
    layer: int
    expert: int


class Picture(NamedTuple):
    """What tells pictures apart."""

    image_id: int
    """Number in the stream; where there is none, -1 less the example's position."""
    turn: int
    """How many pictures of the same example stand before it."""


class Held(NamedTuple):
    """A patch that is kept."""

    order: tuple[float, Picture, int, int]
    """Sorts patches, the best first: gate with a minus, picture, place, position of the example in its stream."""
    patch: LikedPatch


@dataclass(frozen=True)
class _Pictures:
    """The images of one batch."""

    pixels_ICHW: Tensor
    pictures: Sequence[Picture]
    """Of each image."""
    names: Sequence[str]
    """Of each image."""
    positions: Sequence[int]
    """Of each image's example in its stream."""
    number_I: Tensor
    """int64, which of the batch's different pictures an image shows, in their order."""
    num_different: int
    """U."""
    grid: int
    """Patches along a side."""


@dataclass
class PatchCollector:
    """For each task, layer and expert the patches of its largest gates, at most one of each picture.

    First choices count, whether or not the expert had a place. Masked patches and [CLS] are left out. Which of equal
    gates are kept does not depend on the order of the batches. Pixels are copied of kept patches only, so memory
    does not grow with the tokens.
    """

    trace: Trace
    """Knows tasks and kinds of tokens."""
    top: int = 8
    """Most patches for each expert."""
    held: dict[Place, dict[Picture, Held]] = field(init=False, repr=False, default_factory=lambda: defaultdict(dict))
    """What is kept, the pictures in any order."""

    @torch.no_grad()
    def receive(self, batch: Batch, encoded: Encoded, names: Sequence[str] = ()) -> None:
        """Look at one forward pass.

        Args:
            batch: what the encoder was given.
            encoded: its result.
            names: of the examples, in the batch's order; none: they are called by the number of their picture.

        Raises ValueError where the number of names is not that of the examples.
        """
        if not batch.num_images:
            return
        images = _pictures_of(batch, names)
        for rows in self.trace.rows(batch, encoded):
            if rows.cell.modality == "vision":
                self._add(rows, images)

    def absorb(self, held: Mapping[Place, Mapping[Picture, Held]]) -> None:
        """Add what another process kept."""
        for place, own in held.items():
            for picture, one in own.items():
                if self._wins(place, picture, one.order):
                    self._keep(place, picture, one)

    def liked(self) -> tuple[LikedPatch, ...]:
        """What was kept, by task, layer and expert, the largest gate first."""
        found = (sorted(self.held[place].values(), key=lambda one: one.order) for place in sorted(self.held))
        return tuple(one.patch for own in found for one in own)

    def _add(self, rows: Rows, images: _Pictures) -> None:
        gate_UE, token_UE = _best_tokens(rows, images)
        gate_UE, order_UE = gate_UE.sort(dim=0, descending=True, stable=True)
        gate_RE, token_RE = gate_UE[: self.top].cpu().double(), token_UE.gather(0, order_UE)[: self.top].cpu()
        places = [Place(rows.cell.task, rows.cell.layer, expert) for expert in range(gate_RE.shape[1])]
        floor_E = torch.tensor([self._floor(place) for place in places], dtype=torch.float64)
        for rank, expert in (gate_RE >= floor_E).nonzero().tolist():
            self._look(places[expert], images, int(token_RE[rank, expert]), float(gate_RE[rank, expert]))

    def _floor(self, place: Place) -> float:
        """The gate that a patch must have to be kept."""
        held = self.held.get(place, {})
        return min(one.patch.gate for one in held.values()) if len(held) == self.top else 0.0

    def _look(self, place: Place, images: _Pictures, token: int, gate: float) -> None:
        """Keep a patch of a batch, with a copy of its pixels, if it is good enough."""
        number, image = divmod(token, len(images.pictures))
        picture, patch = images.pictures[image], number - 1
        order = (-gate, picture, patch, images.positions[image])
        if self._wins(place, picture, order):
            crop, box = _crop(images.pixels_ICHW[image], patch, images.grid)
            liked = LikedPatch(*place, gate, images.names[image], patch, crop, box)
            self._keep(place, picture, Held(order, liked))

    def _wins(self, place: Place, picture: Picture, order: tuple[float, Picture, int, int]) -> bool:
        """Over the kept patch of the same picture, else over the last of all kept ones."""
        held = self.held[place]
        if picture in held:
            return order < held[picture].order
        return len(held) < self.top or order < max(one.order for one in held.values())

    def _keep(self, place: Place, picture: Picture, one: Held) -> None:
        held = self.held[place]
        held[picture] = one
        if len(held) > self.top:
            del held[max(held, key=lambda other: held[other].order)]


def _best_tokens(rows: Rows, images: _Pictures) -> tuple[Tensor, Tensor]:
    """Of each picture and expert (U, E), the largest gate of its visible patches whose first choice the expert is.

    NONE where there is no such patch. And the token with that gate (U, E), of several the first by place in the
    picture, then by image: place x I + image.
    """
    first_T1, experts = rows.plan.expert_TK[:, :1], rows.plan.num_experts
    seen_T = rows.facts.kind_T == VISION_KINDS.index("patch")
    gate_T = rows.plan.probs_TE.gather(1, first_T1)[:, 0].masked_fill(~seen_T, NONE)
    num_images, tokens = len(images.pictures), gate_T.shape[0]
    image_T = torch.arange(num_images, device=gate_T.device).repeat_interleave(1 + images.grid**2)
    group_T = images.number_I[image_T] * experts + first_T1[:, 0]
    gate_G = gate_T.new_full((images.num_different * experts,), NONE).scatter_reduce(0, group_T, gate_T, "amax")
    token_T = rows.facts.place_T * num_images + image_T
    token_T = token_T.masked_fill(gate_T < gate_G[group_T], tokens)
    token_G = token_T.new_full(gate_G.shape, tokens).scatter_reduce(0, group_T, token_T, "amin")
    return gate_G.view(-1, experts), token_G.view(-1, experts)


def _pictures_of(batch: Batch, names: Sequence[str]) -> _Pictures:
    turns, named = _turns(batch), _names(batch, names)
    positions, examples = batch.positions.tolist(), batch.example_of_sequence.tolist()
    sequences = batch.sequence_of_image.tolist()
    pictures = [
        Picture(image_id if image_id >= 0 else -1 - positions[examples[sequence]], turns[sequence])
        for image_id, sequence in zip(batch.image_ids.tolist(), sequences, strict=True)
    ]
    number = {picture: u for u, picture in enumerate(sorted(set(pictures)))}
    return _Pictures(
        pixels_ICHW=batch.pixels_ICHW,
        pictures=pictures,
        names=[named[sequence] for sequence in sequences],
        positions=[positions[examples[sequence]] for sequence in sequences],
        number_I=torch.tensor([number[p] for p in pictures], device=batch.pixels_ICHW.device),
        num_different=len(number),
        grid=_grid(batch),
    )


@dataclass
class ExampleCollector:
    """The first examples of each stream, and where their tokens went; several sequences of an example one by one."""

    trace: Trace
    """Knows tasks and kinds of tokens."""
    pieces: Sequence[str]
    """Of the text tokenizer, by token id."""
    most: int = 8
    """Most examples of each stream."""
    _kept: Counter[StreamName] = field(init=False, repr=False, default_factory=Counter)
    _examples: list[TracedExample] = field(init=False, repr=False, default_factory=list)

    @torch.no_grad()
    def receive(self, batch: Batch, encoded: Encoded, names: Sequence[str] = ()) -> None:
        """Look at one forward pass; arguments and errors as those of `PatchCollector.receive`."""
        stream = stream_of(batch)
        room = self.most - self._kept[stream]
        if room <= 0 or not batch.num_sequences:
            return
        self._kept[stream] += min(room, batch.num_examples)
        rows, named = list(self.trace.rows(batch, encoded)), _names(batch, names)
        for sequence, example in enumerate(batch.example_of_sequence.tolist()):
            if example < room:
                self._examples.append(self._traced(batch, rows, sequence, named[sequence]))

    def examples(self) -> tuple[TracedExample, ...]:
        """What was kept, in the order in which it came."""
        return tuple(self._examples)

    def _traced(self, batch: Batch, rows: Sequence[Rows], sequence: int, name: str) -> TracedExample:
        pixels = batch.pixels_ICHW[batch.sequence_of_image == sequence]
        ids = batch.text_ids_T[batch.sequence_of_text == sequence].tolist()
        grid = (_grid(batch),) * 2 if len(pixels) else (0, 0)
        return TracedExample(
            name=name,
            task=self.trace.tasks[stream_of(batch)],
            image=_to_image(pixels[0]) if len(pixels) else None,
            words=tuple(self.pieces[i] for i in ids),
            layers=tuple(_layer(rows, layer, sequence, grid) for layer in dict.fromkeys(r.cell.layer for r in rows)),
        )


def _layer(rows: Sequence[Rows], layer: int, sequence: int, grid: tuple[int, int]) -> TracedLayer:
    here = {r.cell.modality: _choices(r, sequence) for r in rows if r.cell.layer == layer}
    return TracedLayer(layer, grid, *here.get("vision", ((), ())), *here.get("text", ((), ())))


def _choices(rows: Rows, sequence: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """First choices of a sequence's patches or text tokens, and whether they were kept."""
    mine_T = rows.facts.sequence_T == sequence
    if rows.cell.modality == "vision":
        mine_T &= rows.facts.kind_T != VISION_KINDS.index("[CLS]")
    return tuple(rows.plan.expert_TK[mine_T, 0].tolist()), tuple(rows.plan.kept_TK[mine_T, 0].tolist())


def _turns(batch: Batch) -> list[int]:
    """Of each sequence, how many of the same example stand before it."""
    before: Counter[int] = Counter()
    turns = []
    for example in batch.example_of_sequence.tolist():
        turns.append(before[example])
        before[example] += 1
    return turns


def _names(batch: Batch, names: Sequence[str]) -> list[str]:
    """Of each sequence: its example's name, with the number of the picture where the example has several."""
    named = list(names) or _numbers(batch)
    if len(named) != batch.num_examples:
        raise ValueError(f"{len(named)} names for a batch of {batch.num_examples} examples; pass one for each, or none")
    examples = batch.example_of_sequence.tolist()
    times = Counter(examples)
    return [
        f"{named[example]}, picture {turn + 1}" if times[example] > 1 else named[example]
        for example, turn in zip(examples, _turns(batch), strict=True)
    ]


def _numbers(batch: Batch) -> list[str]:
    """What examples without names are called: by their picture, else by their position in the stream."""
    named = [f"example {position}" for position in batch.positions.tolist()]
    example_I = batch.example_of_sequence[batch.sequence_of_image]
    for example, image_id in zip(example_I.tolist(), batch.image_ids.tolist(), strict=True):
        if image_id >= 0:
            named[example] = f"image {image_id}"
    return named


def _grid(batch: Batch) -> int:
    """Patches along a side."""
    return math.isqrt(batch.patch_mask_IP.shape[1])


def _crop(pixels_CHW: Tensor, place: int, grid: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A patch with its neighbours, and the patch inside."""
    side = pixels_CHW.shape[1] // grid
    row, column = divmod(place, grid)
    top, left = max(0, row - 1), max(0, column - 1)
    bottom, right = min(grid, row + 2), min(grid, column + 2)
    crop = _to_image(pixels_CHW[:, top * side : bottom * side, left * side : right * side])
    x, y = (column - left) * side, (row - top) * side
    return crop, (x, y, x + side, y + side)


def _to_image(pixels_CHW: Tensor) -> Image.Image:
    """A copy."""
    return Image.fromarray(pixels_CHW.cpu().permute(1, 2, 0).numpy().copy())
