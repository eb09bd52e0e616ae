"""Stores the visual tokens of every position that a pretraining run reads, for runs that can't afford the encoder.

Images are encoded in the micro-batches of the run, with its tokenizer in its precision, so that the codes are those
that it would make itself.

Axis letters: N positions of a shard, P patches of an image.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmoe_core.checkpoint.files import PARTIAL, rename, sync, sync_tree
from vlmoe_core.data.codes import (
    BROKEN,
    TOKENS_FILE,
    Manifest,
    Part,
    StoredCodes,
    crop_of,
    is_whole,
    read_manifest,
    write_shard,
)
from vlmoe_core.data.config import DataConfig
from vlmoe_core.data.loader import MicroBatch, MicroBatches, load
from vlmoe_core.data.stream import open_streams
from vlmoe_core.errors import DataError, RecipeError, TokenizerError, UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tokenizers.online import OnlineTokenizer
from vlmoe_core.tokenizers.text import wordless_tokenizer
from vlmoe_core.tokenizers.visual import VisualTokenizer, load_visual_tokenizer
from vlmoe_core.train.build import build_image_dataset, micro_sizes
from vlmoe_core.train.codes import check_first, describe, positions_read
from vlmoe_core.train.fitting import Tokenizers, check_fit, obtain_visual
from vlmoe_core.train.init import open_start
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.visual import KEPT

SHARD_POSITIONS = 2**16
"""Positions of a shard, rounded down to whole micro-batches."""


@dataclass(frozen=True)
class Tokenized:
    """What a folder of stored tokens holds."""

    folder: Path
    """The folder."""
    manifest: Manifest
    """What it says of itself."""
    written: int
    """Shards that were written now; 0: all were there."""
    broken: int
    """Positions whose examples are broken."""


def tokenize_images(recipe: Recipe, folder: Path, reporter: Reporter) -> Tokenized:
    """Store the codes of every image that a run reads; in a folder that was begun, the shards that are missing.

    Args:
        recipe: a pretraining run with images.
        folder: where they are written.
        reporter: is told the disk that is needed, and how far it is.

    Raises:
        RecipeError: the recipe predicts no visual codes.
        UsageError: the folder holds something else, or codes for another run.
        DataError: an example is broken and `data.on_error` is `raise`, or has several pictures.
        TokenizerError: the tokenizer is missing or does not fit.
    """
    try:
        return _tokenize(_encoding(recipe), folder, reporter)
    except OSError as error:
        raise UsageError(
            f"{folder} can't be written: {error.strerror or error}; make room, or choose another folder with --out"
        ) from error


def _tokenize(recipe: Recipe, folder: Path, reporter: Reporter) -> Tokenized:
    data = {
        "train": build_image_dataset(recipe, recipe.data.train, training=True),
        "eval": build_image_dataset(recipe, recipe.data.eval, training=False),
    }
    _check_folder(folder)
    visual = _tokenizer(recipe, folder / KEPT, reporter)
    manifest = describe(recipe, visual, tuple(_parts(recipe, data["train"], data["eval"])))
    _begin(folder, manifest, data)
    missing = {part: _missing(folder, manifest, part) for part in manifest.parts}
    _announce(folder, manifest, missing, data, reporter)
    writer = ShardWriter(folder, manifest, visual, recipe.data, reporter)
    for part, numbers in missing.items():
        writer.write(part, numbers, data[part.split])
    stored = [StoredCodes(folder, part, manifest.patches) for part in manifest.parts]
    broken = sum(shard.num_broken for codes in stored for shard in codes.shards())
    return Tokenized(folder, manifest, sum(map(len, missing.values())), broken)


def _encoding(recipe: Recipe) -> Recipe:
    """The recipe of the same run without stored tokens. Raises RecipeError where it predicts no codes."""
    if not recipe.hides:
        aim = f"objective {recipe.objective.name}" if recipe.objective else f"task {recipe.task.name}"  # type: ignore[union-attr]
        raise RecipeError(f"{aim} predicts no visual codes; give the recipe of a pretraining run by masked modelling")
    if not (recipe.data.train.image or recipe.data.train.pair):
        raise RecipeError("data.train has neither images nor pairs, so there is nothing to encode")
    visual = recipe.tokenizers.visual.model_copy(update={"tokens": None})
    return recipe.model_copy(update={"tokenizers": recipe.tokenizers.model_copy(update={"visual": visual})})


def _tokenizer(recipe: Recipe, kept: Path, reporter: Reporter) -> VisualTokenizer:
    """The tokenizer of the run; one that it would fit is fitted once, and kept with the codes."""
    start = open_start(recipe.init)
    visual = start.tokenizers(recipe).visual if start else None
    if visual is None and recipe.tokenizers.visual.is_fitted and kept.is_dir():
        visual = load_visual_tokenizer(kept)
    elif visual is None:
        streams = open_streams(recipe.data, recipe.data.train, recipe.seed)
        visual = obtain_visual(recipe, streams.values(), reporter)
        if visual is not None and recipe.tokenizers.visual.is_fitted:
            _keep(visual, kept)
    if visual is None:
        raise TokenizerError("no visual tokenizer could be fitted: none of the images that the fit reads can be read")
    check_fit(recipe, Tokenizers(wordless_tokenizer(), visual))
    return visual


def _keep(visual: VisualTokenizer, kept: Path) -> None:
    fresh = kept.with_name(kept.name + PARTIAL)
    shutil.rmtree(fresh, ignore_errors=True)
    visual.save(fresh)
    sync_tree(fresh)
    rename(fresh, kept)


def _parts(recipe: Recipe, train: MicroBatches, held_out: MicroBatches) -> Iterable[Part]:
    """What to store. How many held-out texts there are is not known here, so as many as may be are counted."""
    texts = micro_sizes(recipe, recipe.data.eval).get("text")
    most_texts = -(-recipe.train.eval_examples // texts) if texts else 0
    wanted = positions_read(recipe, train, held_out, max(held_out.num_micros, most_texts))
    for (split, stream), positions in wanted.items():
        size = (train if split == "train" else held_out).sizes[stream]
        yield Part(split, stream, positions, size * max(1, SHARD_POSITIONS // size))


def _check_folder(folder: Path) -> None:
    """Raises UsageError for a folder of other things."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; choose another one with --out")
    ours = {KEPT, KEPT + PARTIAL, TOKENS_FILE + PARTIAL}
    if folder.is_dir() and not (folder / TOKENS_FILE).exists() and {p.name for p in folder.iterdir()} - ours:
        raise UsageError(f"{folder} holds files that are no stored tokens; choose an empty folder with --out")


def _begin(folder: Path, manifest: Manifest, data: Mapping[str, MicroBatches]) -> None:
    """Say in the folder what will be stored. Raises UsageError where it was begun for another run."""
    path = folder / TOKENS_FILE
    if path.exists():
        return _check_begun(folder, manifest, data)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    manifest.write(partial)
    sync(partial)
    rename(partial, path)


def _check_begun(folder: Path, manifest: Manifest, data: Mapping[str, MicroBatches]) -> None:
    if differences := read_manifest(folder).differences(manifest):
        raise UsageError(f"{folder} was begun for another run: {differences}; choose another folder with --out")
    for part in manifest.parts:
        if is_whole(folder, part, 0, manifest.patches):
            codes = {part.stream: StoredCodes(folder, part, manifest.patches)}
            try:
                check_first(replace(data[part.split], codes=codes))
            except TokenizerError as error:
                raise UsageError(
                    f"{folder} was begun with other pixels of the {part.stream} stream ({part.split}): data, seed, "
                    "augmentation or Pillow differ; choose another folder with --out"
                ) from error


def _missing(folder: Path, manifest: Manifest, part: Part) -> list[int]:
    """The shards that are not there, or damaged."""
    return [number for number in range(part.num_files) if not is_whole(folder, part, number, manifest.patches)]


def _announce(
    folder: Path,
    manifest: Manifest,
    missing: Mapping[Part, Sequence[int]],
    data: Mapping[str, MicroBatches],
    reporter: Reporter,
) -> None:
    """Tell what will be written, and how much disk it needs."""
    positions = sum(len(part.span(number)) for part, numbers in missing.items() for number in numbers)
    if not positions:
        return reporter.note(f"{folder} holds the tokens of all {manifest.positions:,} positions; nothing to do")
    needed, free = positions * manifest.row_bytes / 1e6, shutil.disk_usage(folder).free / 1e6
    begun = f" of {manifest.positions:,}, the others are there" if positions < manifest.positions else ""
    reporter.note(f"tokens to store: {positions:,} positions{begun}; {needed:,.1f} MB in {folder}, {free:,.0f} MB free")
    micros = (len(_micros(part, n, data[part.split])) for part, numbers in missing.items() for n in numbers)
    reporter.counted(sum(micros))


def _micros(part: Part, number: int, data: MicroBatches) -> range:
    """The micro-batches of a shard."""
    span, size = part.span(number), data.sizes[part.stream]
    return range(span.start // size, -(-span.stop // size))


def default_tokens(name: str) -> Path:
    """Where the tokens of the recipe of that name lie if nobody says otherwise: `tokens/flickr8k-pretrain`."""
    return Path("tokens") / name.replace("/", "-")


class ShardWriter:
    """Encodes micro-batches and writes their codes, a shard at a time.

    Args:
        folder: where shards are written.
        manifest: what they hold.
        visual: the tokenizer.
        config: loader processes, and what to do with broken examples.
        reporter: is told of every micro-batch and every shard.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, visual: VisualTokenizer, config: DataConfig, reporter: Reporter
    ) -> None:
        self.folder, self.manifest, self.config, self.reporter = folder, manifest, config, reporter
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.tokenizer = OnlineTokenizer(visual, manifest.precision).to(self.device)
        self.encoded = 0

    def write(self, part: Part, numbers: Sequence[int], data: MicroBatches) -> None:
        """Write shards of a part; each has its final name once it is whole."""
        alone = replace(data, streams={part.stream: data.streams[part.stream]}, names=(part.stream,))
        spans = [_micros(part, number, data) for number in numbers]
        micros = load(alone, chain.from_iterable(spans), self.config)
        for number, span in zip(numbers, spans, strict=True):
            codes_NP, crops_N = self._shard(part, part.span(number), islice(micros, len(span)))
            path = self.folder / part.file(number)
            partial = path.with_name(path.name + PARTIAL)
            write_shard(partial, codes_NP, crops_N)
            sync(partial)
            rename(partial, path)
            self.reporter.note(f"{part.name}: {part.span(number).stop:,} of {part.positions:,} positions are stored")

    def _shard(self, part: Part, span: range, micros: Iterable[MicroBatch]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        codes_NP = np.zeros((len(span), self.manifest.patches), self.manifest.dtype)
        crops_N = np.full(len(span), BROKEN, np.int64)
        for micro in micros:
            batch = micro.batches[part.stream]
            if batch.num_images != batch.num_examples:
                raise DataError(
                    f"an example of the {part.stream} stream ({part.split}) has several pictures, and stored tokens "
                    "are of one a position; take out its source, or encode in the step"
                )
            if batch.num_images:
                rows = batch.positions.numpy() - span.start
                codes_NP[rows] = self.tokenizer.encode(batch.pixels_ICHW.to(self.device)).cpu().numpy()
                crops_N[rows] = [crop_of([pixels]) for pixels in batch.pixels_ICHW.numpy()]
            self.encoded += 1
            self.reporter.advanced(self.encoded)
        return codes_NP, crops_N
