"""The data of a recipe before a run: index caches built ahead, every example looked at, a contact sheet."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmoe_core.data.check import SourceSurvey, describe_source, survey_source
from vlmoe_core.data.config import SPLITS, StreamName
from vlmoe_core.data.contact_sheet import Cell, Panel, Piece, draw_contact_sheet
from vlmoe_core.data.example import Sample, TextEncoder
from vlmoe_core.data.index import cache_folder
from vlmoe_core.data.prepare import Preparer
from vlmoe_core.data.stream import Stream, open_streams
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tokenizers.text import TextTokenizer
from vlmoe_core.train.build import HELD_OUT_SEED, recipe_preparer
from vlmoe_core.train.fitting import obtain_labels, obtain_text
from vlmoe_core.train.init import open_start
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.stand_ins import NumberEncoder

COLUMNS: Mapping[StreamName, int] = {"image": 6, "pair": 6, "text": 2}
CELLS: Mapping[StreamName, int] = {"image": 12, "pair": 12, "text": 4}
MOST_TRIED = 10
"""Positions that are tried for each cell of the contact sheet, where examples are broken."""


@dataclass(frozen=True)
class SourceRow:
    """One source of a recipe."""

    split: str
    """train, eval or test."""
    stream: StreamName
    """image, text or pair."""
    source: str
    """The source as the recipe names it."""
    examples: int
    """Examples that it holds."""


@dataclass(frozen=True)
class Indexed:
    """What `index_data` did."""

    sources: tuple[SourceRow, ...]
    """Every source."""
    cache: Path
    """Where the index caches lie."""


@dataclass(frozen=True)
class Checked:
    """What `check_data` found."""

    sources: tuple[tuple[SourceRow, SourceSurvey], ...]
    """Every source."""
    sheet: Path
    """The contact sheet."""

    @property
    def broken(self) -> tuple[str, ...]:
        """Messages of all broken examples that were read."""
        return tuple(message for _, survey in self.sources for message in survey.broken)


def index_data(recipe: Recipe, reporter: Reporter) -> Indexed:
    """Open every source with the tokenizer of the run, which builds the index caches that are not there yet.

    A text tokenizer that the recipe does not name is fitted as the run will fit it: the same texts give the same
    tokenizer, so the run finds the packing indexes.

    Raises:
        DataError: a source is missing, damaged or empty.
        TokenizerError: the text tokenizer can't be loaded or fitted.
    """
    encoder = _text_tokenizer(recipe, reporter)
    rows = [row for row, _, _ in _sources(recipe, encoder)]
    return Indexed(tuple(rows), cache_folder())


def check_data(loaded: LoadedRecipe, limit: int | None, folder: Path, reporter: Reporter) -> Checked:
    """Read the examples of every source and draw a contact sheet of the training streams.

    Args:
        loaded: the recipe.
        limit: most examples to read of each source, evenly spread; None: all.
        folder: where `<name>-contact-sheet.png` is written; made if need be.
        reporter: is told which source is read.

    Raises:
        DataError: a source is missing, damaged or empty. Broken examples are part of the result.
        TokenizerError: the text tokenizer can't be loaded or fitted.
        UsageError: the contact sheet can't be written.
    """
    recipe = loaded.recipe
    path = _sheet_path(folder, loaded.name)
    tokenizer = _text_tokenizer(recipe, reporter)
    labels = obtain_labels(recipe)
    preparers = {training: _preparer(recipe, tokenizer, labels, training) for training in (True, False)}
    surveys = []
    for row, stream, number in _sources(recipe, tokenizer):
        count = min(row.examples, limit or row.examples)
        reporter.note(f"reading {count:,} of {row.examples:,} examples: data.{row.split}.{row.stream}, {row.source}")
        surveys.append((row, survey_source(stream, number, preparers[row.split == "train"], limit)))
    _draw_sheet(loaded, tokenizer, preparers[True], path)
    return Checked(tuple(surveys), path)


def _text_tokenizer(recipe: Recipe, reporter: Reporter) -> TextTokenizer | None:
    """The run's text tokenizer; None in a recipe without texts."""
    if not any(getattr(recipe.data, split).text or getattr(recipe.data, split).pair for split in SPLITS):
        return None
    if start := open_start(recipe.init):
        return start.text_tokenizer
    streams = open_streams(recipe.data, recipe.data.train, recipe.seed)
    return obtain_text(recipe, streams.values(), reporter)


def _sources(recipe: Recipe, encoder: TextEncoder | None) -> Iterator[tuple[SourceRow, Stream, int]]:
    """Every source of every split: its row, its stream, its number in the stream."""
    for split in SPLITS:
        seed = recipe.seed if split == "train" else HELD_OUT_SEED
        for stream in open_streams(recipe.data, getattr(recipe.data, split), seed, encoder).values():
            for number, (config, source) in enumerate(zip(stream.configs, stream.sources, strict=True)):
                yield SourceRow(split, stream.name, describe_source(config), len(source)), stream, number


def _preparer(recipe: Recipe, tokenizer: TextTokenizer | None, labels: Labels, training: bool) -> Preparer:
    encoder: TextEncoder = tokenizer or NumberEncoder(recipe.tokenizers.text.vocab_size)
    return recipe_preparer(recipe, encoder, labels, training)


def _sheet_path(folder: Path, name: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {folder} can't be made: {error.strerror}; give a folder that can be written"
        ) from error
    return folder / f"{name.replace('/', '-')}-contact-sheet.png"


def _draw_sheet(loaded: LoadedRecipe, tokenizer: TextTokenizer | None, preparer: Preparer, path: Path) -> None:
    recipe = loaded.recipe
    streams = open_streams(recipe.data, recipe.data.train, recipe.seed, tokenizer)
    panels = [_panel(recipe.model.grid, stream, tokenizer, preparer) for stream in streams.values()]
    note = (
        "The first training examples of each stream as the model gets them: cropped, cut, masked. Veiled patches and "
        "marked words are hidden from it; it must predict them."
    )
    sheet = draw_contact_sheet(loaded.name, note, panels)
    try:
        sheet.save(path)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}; choose another folder with --out") from error


def _panel(grid: int, stream: Stream, tokenizer: TextTokenizer | None, preparer: Preparer) -> Panel:
    cells = tuple(_cell(sample, grid, tokenizer) for sample in _first_samples(stream, preparer))
    sources = ", ".join(describe_source(config) for config in stream.configs)
    return Panel(f"{stream.name} stream", f"{sources} · {_hidden_share(cells)}", COLUMNS[stream.name], cells)


def _first_samples(stream: Stream, preparer: Preparer) -> Iterator[Sample]:
    """The stream's first examples in training order, exactly as training gets them; broken ones are left out."""
    wanted = CELLS[stream.name]
    for position in range(min(wanted * MOST_TRIED, stream.epoch)):
        try:
            yield preparer(stream.name, position, stream[position], stream.random(position))
        except DataError:
            continue
        wanted -= 1
        if not wanted:
            return


def _hidden_share(cells: Sequence[Cell]) -> str:
    """How much of the drawn examples is hidden, in words."""
    patches = [bool(hidden) for cell in cells if cell.hidden_GG is not None for hidden in cell.hidden_GG.flat]
    tokens = [piece.hidden for cell in cells for piece in cell.pieces]
    shares = [f"{sum(v) / len(v):.0%} of the {name}" for name, v in (("patches", patches), ("tokens", tokens)) if v]
    return f"{' and '.join(shares)} hidden" if shares else "no readable example"


def _cell(sample: Sample, grid: int, tokenizer: TextTokenizer | None) -> Cell:
    hidden_GG = None if sample.patch_mask is None else sample.patch_mask.reshape(grid, grid)
    return Cell(sample.pixels, hidden_GG, () if tokenizer is None else tuple(pieces_of(sample, tokenizer)))


def pieces_of(sample: Sample, tokenizer: TextTokenizer) -> Iterator[Piece]:
    """The original tokens of a sample's text, without those around it and padding."""
    if sample.text_ids is None or sample.text_targets is None:
        return
    around = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}
    read = [
        (t if t >= 0 else i, t >= 0)
        for i, t in zip(sample.text_ids.tolist(), sample.text_targets.tolist(), strict=True)
    ]
    kept = [(i, hidden) for i, hidden in read if hidden or i not in around]
    shown = ""
    for number, (token, hidden) in enumerate(kept):
        if token in tokenizer.special_ids:
            yield Piece(tokenizer.id_to_token(token), hidden, glued=False)
            continue
        # What the token adds to the decoded text tells where words begin, whatever the kind of tokenizer.
        text = tokenizer.decode([i for i, _ in kept[: number + 1]])
        added = text[_common(shown, text) :]
        yield Piece(added.strip(), hidden, glued=bool(shown) and not added.startswith(" "))
        shown = text


def _common(first: str, second: str) -> int:
    """Length of the start that two texts share."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
