"""The tokenizers of a run and the labels of its task: loaded, or made from its own data by rank 0, then read by all."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.checkpoint.files import rename, sync_tree
from vlmoe_core.data.check import describe_source
from vlmoe_core.data.config import SPLITS, STREAMS, SplitConfig, StreamName
from vlmoe_core.data.example import Example, LabelledSource
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.data.prepare import read_pixels
from vlmoe_core.data.stream import Stream, open_streams
from vlmoe_core.errors import DataError, RecipeError, TokenizerError
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.tasks.labels import NO_LABELS, Labels, load_labels
from vlmoe_core.tasks.task import open_task
from vlmoe_core.tokenizers.codebook import fit_codebook
from vlmoe_core.tokenizers.text import TextTokenizer, fit_wordpiece, load_text_tokenizer, wordless_tokenizer
from vlmoe_core.tokenizers.visual import VisualTokenizer, load_visual_tokenizer
from vlmoe_core.train.parallel import everywhere, on_main
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.visual import find_visual_tokenizer, kept_tokenizer

MOST_SHOWN = 8


@dataclass(frozen=True)
class Tokenizers:
    """What turns words, patches and labels of a run into numbers."""

    text: TextTokenizer
    """Words; only special tokens in a run without texts."""
    visual: VisualTokenizer | None
    """Patches; null in a run without images, and in a task."""
    labels: Labels = NO_LABELS
    """What the head of a task chooses from."""


@dataclass(frozen=True)
class Given:
    """Tokenizers that come with the model that a run starts from."""

    text: TextTokenizer | None = None
    """Null: the run has its own."""
    visual: VisualTokenizer | None = None
    """Null: the run has its own."""


def obtain_tokenizers(recipe: Recipe, folder: Path, reporter: Reporter, given: Given = Given()) -> Tokenizers:
    """The tokenizers of a run, from `folder` if they are there, else loaded or fitted by rank 0 and written into it.

    Args:
        recipe: the run.
        folder: where they lie.
        reporter: is told what was fitted.
        given: those of the model that the run starts from.

    Raises:
        TokenizerError: one can't be loaded or fitted, does not fit the recipe, or is not seen by every process.
        DataError: an example that the fit reads is broken and `data.on_error` is `raise`.
    """

    def write_once() -> None:
        if not folder.exists():
            _write_tokenizers(recipe, folder, reporter, given)

    def read() -> Tokenizers:
        if not folder.is_dir():
            raise TokenizerError(f"a process does not find {folder}: all machines of a run must share its disk")
        return read_tokenizers(recipe, folder)

    on_main(write_once)
    return everywhere(read)


def take_tokenizers(source: Path, folder: Path) -> None:
    """Copy the tokenizers of a checkpoint into the folder of a run that goes on from it elsewhere."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    sync_tree(fresh)
    rename(fresh, folder)


def read_tokenizers(recipe: ModelRecipe, folder: Path) -> Tokenizers:
    """Both tokenizers as they were written. Raises TokenizerError where they don't fit the recipe."""
    visual = load_visual_tokenizer(folder / "visual") if (folder / "visual").exists() else None
    tokenizers = Tokenizers(load_text_tokenizer(str(folder / "text")), visual, load_labels(folder / "labels"))
    check_fit(recipe, tokenizers)
    return tokenizers


def _write_tokenizers(recipe: Recipe, folder: Path, reporter: Reporter, given: Given) -> None:
    """Write all beside their final place and rename, so that a folder that is there is whole."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    streams = open_streams(recipe.data, recipe.data.train, recipe.seed)
    text = given.text or obtain_text(recipe, streams.values(), reporter)
    text.save(fresh / "text")
    visual = None
    if recipe.hides:
        visual = given.visual or obtain_visual(recipe, streams.values(), reporter)
    if visual is not None:
        visual.save(fresh / "visual")
    labels = obtain_labels(recipe)
    if labels.names:
        labels.save(fresh / "labels")
        reporter.note(f"{len(labels.names):,} labels: {_shown(labels.names)}")
    check_fit(recipe, Tokenizers(text, visual))
    sync_tree(fresh)
    rename(fresh, folder)


def obtain_labels(recipe: Recipe) -> Labels:
    """The labels of the recipe's task, from the records of its data; none in pretraining.

    Raises:
        RecipeError: a split has no source of the task's stream, or one of another stream.
        DataError: a source holds no label that the task can use.
    """
    if recipe.task is None:
        return Labels()
    task = open_task(recipe.task)
    check_streams(recipe, task.stream)
    return task.find_labels(records(recipe, recipe.data.train), records(recipe, recipe.data.eval))


def check_streams(recipe: Recipe, stream: StreamName) -> None:
    """Raises RecipeError where a task would meet no example, or where sources would never be read."""
    assert recipe.task is not None
    for split in SPLITS:
        there = [name for name in STREAMS if getattr(getattr(recipe.data, split), name)]
        if there != [stream] and (there or split == "train"):
            raise RecipeError(
                f"task {recipe.task.name} reads data.{split}.{stream}, but data.{split} has sources of: "
                f"{', '.join(there)}; list the sources of the task under {stream}, and no others"
            )


def records(recipe: Recipe, split: SplitConfig) -> Iterator[Example]:
    """Every example of a split, in stored order, without its pictures.

    Raises DataError for a source that holds captions or documents only.
    """
    for stream in open_streams(recipe.data, split, recipe.seed).values():
        for config, source in zip(stream.configs, stream.sources, strict=True):
            if not isinstance(source, LabelledSource):
                raise DataError(
                    f"the source {describe_source(config)} can't be finetuned on: it has no labelled examples; "
                    "docs/DATA.md lists the sources of each task"
                )
            yield from source.records()


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:MOST_SHOWN]) + (", ..." if len(names) > MOST_SHOWN else "")


def obtain_text(recipe: Recipe, streams: Iterable[Stream], reporter: Reporter) -> TextTokenizer:
    """Load the text tokenizer that the recipe names, or fit one on the texts of the streams, if there are any."""
    config = recipe.tokenizers.text
    if config.load is not None:
        return load_text_tokenizer(config.load)
    sources = [source for stream in streams if stream.name != "image" for source in stream.sources]
    if not sources:
        return wordless_tokenizer()
    share = -(-config.fit_texts // len(sources))
    texts = [text for source in sources for text in islice(source.texts(), share)]
    tokenizer = fit_wordpiece(texts, config.vocab_size, config.lowercase)
    reporter.note(
        f"text tokenizer: WordPiece fitted on {len(texts):,} texts, {tokenizer.vocab_size:,} words and pieces"
    )
    return tokenizer


def obtain_visual(recipe: Recipe, streams: Iterable[Stream], reporter: Reporter) -> VisualTokenizer | None:
    """Load the visual tokenizer that the recipe names, or fit one on the images of the streams, if there are any."""
    config = recipe.tokenizers.visual
    if config.load is not None:
        return find_visual_tokenizer(config.load)
    if config.tokens is not None:
        return kept_tokenizer(Path(config.tokens))
    if config.kind != "codebook":
        raise TokenizerError(
            f"a {config.kind} tokenizer is trained by a run of its own (vlmoe pretrain tokenizer/vqkd-tiny) or "
            "imported (vlmoe import vqkd); name it with tokenizers.visual.load"
        )
    images = list(fit_images(recipe, [s for s in streams if s.name != "text"]))
    if not images:
        return None
    tokenizer = fit_codebook(images, recipe.model.patch_size, config.codebook_size, config.iterations, recipe.seed)
    reporter.note(f"visual tokenizer: {config.codebook_size:,} codes fitted on the patches of {len(images):,} images")
    return tokenizer


def fit_images(recipe: Recipe, streams: list[Stream]) -> Iterator[NDArray[np.uint8]]:
    """The first images of each stream, an equal share each, whole and resized."""
    transform = ImageTransform(recipe.model.image_size, None, recipe.data.max_pixels)
    share = -(-recipe.tokenizers.visual.fit_images // max(1, len(streams)))
    for stream in streams:
        for position in range(min(share, stream.epoch)):
            try:
                yield read_pixels(stream.name, stream[position], transform, stream.random(position))
            except DataError:
                if recipe.data.on_error == "raise":
                    raise


def check_fit(recipe: ModelRecipe, tokenizers: Tokenizers) -> None:
    """Raises TokenizerError where the tokenizers don't fit the sizes that stand in the recipe."""
    text, visual = tokenizers.text, tokenizers.visual
    rows, codes = recipe.tokenizers.text.vocab_size, recipe.tokenizers.visual.codebook_size
    if text.vocab_size > rows:
        raise TokenizerError(
            f"the text tokenizer has {text.vocab_size} ids, more than the {rows} rows of the word embedding; "
            f"set tokenizers.text.vocab_size={text.vocab_size}"
        )
    if visual is not None and visual.kind != (kind := recipe.tokenizers.visual.kind):
        raise TokenizerError(
            f"the visual tokenizer is of the kind {visual.kind}, the recipe says {kind}; "
            f"set tokenizers.visual.kind={visual.kind}"
        )
    misfit = visual.misfit(recipe.model.image_size, recipe.model.patch_size) if visual is not None else None
    if misfit is not None:
        raise TokenizerError(misfit)
    if visual is not None and visual.codebook_size != codes:
        raise TokenizerError(
            f"the visual tokenizer has {visual.codebook_size} codes, the recipe says {codes}; "
            f"set tokenizers.visual.codebook_size={visual.codebook_size}"
        )
