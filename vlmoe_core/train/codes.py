"""Stored visual codes in a run: whether they are those that it would make itself, and where it reads them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vlmoe_core.data.codes import ONLINE, Manifest, Part, StoredCodes, read_manifest
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.loader import MicroBatches, accepted
from vlmoe_core.errors import RecipeError, TokenizerError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tokenizers.visual import VisualTokenizer
from vlmoe_core.train.build import BASELINE_EXAMPLES, build_image_dataset

FIRST = 4
"""Positions of each stream whose crops are compared before step 0."""

Places = Mapping[tuple[str, StreamName], int]
"""Positions of each (split, stream)."""


def reads_codes(recipe: Recipe) -> bool:
    """Whether a run reads stored codes; finetuning takes over what pretraining said of tokenizers, and reads none."""
    return recipe.task is None and recipe.tokenizers.visual.tokens is not None


def with_codes(
    recipe: Recipe, visual: VisualTokenizer | None, train: MicroBatches, held_out: MicroBatches
) -> tuple[MicroBatches, MicroBatches]:
    """The training and the held-out data of a run, with the stored codes that its recipe names.

    Raises:
        RecipeError: the recipe predicts no codes.
        TokenizerError: there are none, not enough, or they are of another tokenizer, precision or size, or of other
            pixels.
    """
    folder = Path(recipe.tokenizers.visual.tokens or "")
    if visual is None:
        raise RecipeError("tokenizers.visual.tokens: this recipe predicts no visual codes; take the line out")
    manifest = read_manifest(folder)
    _check_manifest(folder, manifest, describe(recipe, visual, manifest.parts))
    for (split, stream), positions in positions_read(recipe, train, held_out, held_out.num_micros).items():
        _check_positions(folder, manifest, split, stream, positions)
    coded = [_coded(folder, manifest, "train", train), _coded(folder, manifest, "eval", held_out)]
    for data in coded:
        check_first(data)
    return coded[0], coded[1]


def check_codes(recipe: Recipe, visual: VisualTokenizer | None) -> int:
    """Check the stored codes that a recipe names as a run would. Returns the number of positions; errors likewise."""
    with_codes(
        recipe,
        visual,
        build_image_dataset(recipe, recipe.data.train, training=True),
        build_image_dataset(recipe, recipe.data.eval, training=False),
    )
    return read_manifest(Path(recipe.tokenizers.visual.tokens or "")).positions


def describe(recipe: Recipe, visual: VisualTokenizer, parts: tuple[Part, ...]) -> Manifest:
    """What stored codes say of themselves where they are those of the recipe."""
    return Manifest(
        fingerprint=visual.fingerprint,
        precision=recipe.tokenizers.visual.precision,
        image_size=recipe.model.image_size,
        patches=recipe.model.num_patches,
        codes=visual.codebook_size,
        parts=parts,
    )


def positions_read(recipe: Recipe, train: MicroBatches, held_out: MicroBatches, held_out_micros: int) -> Places:
    """Positions of each stream with images that a run reads: in its steps, for its baseline, and held out.

    Args:
        recipe: the run.
        train: its training data.
        held_out: its held-out data.
        held_out_micros: micro-batches of the held-out data.
    """
    micros = max(recipe.train.steps * recipe.batch.num_micro, BASELINE_EXAMPLES * held_out_micros)
    found: dict[tuple[str, StreamName], int] = {("train", name): micros * train.sizes[name] for name in train.streams}
    found |= {("eval", name): min(held_out.limit or 0, stream.epoch) for name, stream in held_out.streams.items()}
    return {place: positions for place, positions in found.items() if place[1] != "text"}


def check_first(data: MicroBatches) -> None:
    """Raises TokenizerError where the codes of the first positions are of other pixels."""
    sizes = {name: min(FIRST, data.sizes[name], codes.part.positions) for name, codes in data.codes.items()}
    accepted(replace(data, sizes=sizes, names=tuple(data.codes))[0])


def _check_manifest(folder: Path, found: Manifest, wanted: Manifest) -> None:
    if differences := found.differences(wanted):
        raise TokenizerError(
            f"{folder} was stored for another run: {differences}; store the tokens anew (vlmoe data tokenize), or "
            f"{ONLINE}"
        )


def _check_positions(folder: Path, manifest: Manifest, split: str, stream: StreamName, wanted: int) -> None:
    part = manifest.find(split, stream)
    stored = part.positions if part else 0
    if stored < wanted:
        raise TokenizerError(
            f"{folder} holds {stored:,} positions of the {stream} stream ({split}), and the run reads {wanted:,}; "
            f"store the tokens anew for this recipe (vlmoe data tokenize), or {ONLINE}"
        )


def _coded(folder: Path, manifest: Manifest, split: str, data: MicroBatches) -> MicroBatches:
    parts = [part for part in manifest.parts if part.split == split and part.stream in data.streams]
    codes = {part.stream: StoredCodes(folder, part, manifest.patches) for part in parts}
    for stored in codes.values():
        stored.check()
    return replace(data, codes=codes)
