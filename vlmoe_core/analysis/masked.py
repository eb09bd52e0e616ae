"""What a pretrained model puts into the gaps of a text and of a picture.

Axis letters: P patches, T text tokens, V words, C codes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.objectives.masking import Masking
from vlmoe_core.train.trained import Trained
from vlmoe_core.train.visual import refuse_tokenizer

INPUTS = {"image": "single images", "text": "single texts", "pair": "images with texts"}
GAP = 8
VEIL = 96


@dataclass(frozen=True)
class Gap:
    """The most probable words of one [MASK]."""

    place: int
    """Number of the [MASK] in the text, from 0."""
    words: tuple[tuple[str, float], ...]
    """(word, probability), the most probable first."""


@dataclass(frozen=True)
class Filled:
    """What the model predicts."""

    gaps: tuple[Gap, ...]
    """One for each [MASK] of the text."""
    picture: Image.Image | None
    """The picture, its hidden version and its filled version side by side; null without an image, and undrawn."""
    hidden: int
    """Patches that were hidden."""
    undrawn: str | None = None
    """Why there is no picture though there is an image; null: there is one, or no image."""


def fill_gaps(trained: Trained, image: Path | None, text: str | None, top: int, seed: int) -> Filled:
    """Predict the [MASK]s of a text and hidden patches of a picture, each in sight of the other.

    Args:
        trained: a model that was pretrained by masked data modelling.
        image: a picture; patches are hidden block-wise at the recipe's rate.
        text: words with [MASK] for the ones to predict.
        top: words for each [MASK].
        seed: chooses the hidden patches.

    Raises:
        UsageError: neither is given, the model has not seen such input, or an image alone can't be drawn.
        DataError: the picture can't be read.
    """
    stream = stream_of(image, text)
    _check_known(trained, stream)
    undrawn = None if image is None else _undrawn(trained)
    if undrawn is not None and text is None:
        raise UsageError(f"{undrawn}; with --text and a [MASK] the words that fit the picture are predicted")
    sample = _make_sample(trained, stream, image, text, seed)
    model = trained.recipe.model
    batch = collate(stream, [sample], model.image_size, model.num_patches)
    with torch.no_grad():
        logits_TV, logits_IPC = trained.objective.predict(batch)  # type: ignore[operator]
    gaps = _gaps(trained, sample, logits_TV, top) if sample.text_ids is not None else ()
    if sample.pixels is None or sample.patch_mask is None:
        return Filled(gaps, None, 0)
    hidden = int(sample.patch_mask.sum())
    if undrawn is not None:
        return Filled(gaps, None, hidden, undrawn)
    return Filled(gaps, _picture(trained, sample.pixels, sample.patch_mask, logits_IPC), hidden)


def stream_of(image: Path | None, text: str | None) -> StreamName:
    """The stream that such input is an example of. Raises UsageError if neither is given."""
    if image is None and text is None:
        raise UsageError("nothing to predict: give --text with a [MASK], --image, or both")
    return "pair" if image is not None and text is not None else "image" if image is not None else "text"


def _undrawn(trained: Trained) -> str | None:
    """Why predicted patches can't be drawn; null: they can."""
    visual = trained.tokenizers.visual
    if visual is None:
        return f"no picture: {trained.name} came without its visual tokenizer, which draws the predicted patches"
    if not visual.draws:
        return "no picture: the codes of the model's visual tokenizer stand for features of its teacher, not for pixels"
    return None


def _check_known(trained: Trained, stream: StreamName) -> None:
    refuse_tokenizer(trained.recipe, trained.name)
    known = [s for s in STREAMS if trained.recipe.batch.size.of(s)]
    if stream not in known:
        raise UsageError(f"{trained.path} was trained on the streams {', '.join(known)}, not on {INPUTS[stream]}")


def _make_sample(trained: Trained, stream: StreamName, image: Path | None, text: str | None, seed: int) -> Sample:
    recipe, encoder = trained.recipe, trained.tokenizers.text
    rng = random.Random(seed)
    pixels = mask = ids = targets = None
    if image is not None:
        pixels = _read_pixels(image, recipe.model.image_size, recipe.data.max_pixels, rng)
        mask = Masking.of(recipe.mask, recipe.model.grid, encoder).image(stream, rng)
    if text is not None:
        words = encoder.encode_masked(text)
        if encoder.mask_id not in words and image is None:
            raise UsageError(f"the text '{text}' has no [MASK] (in capitals) to predict")
        longest = recipe.model.max_text_length - 2
        if len(words) > longest:
            raise UsageError(
                f"the text has {len(words)} tokens, more than the {longest} that the model takes; shorten it"
            )
        ids = np.array([encoder.cls_id, *words, encoder.sep_id], dtype=np.int64)
        targets = np.full(len(ids), -1, dtype=np.int64)
    return Sample(str(image or "text"), 0, 0, pixels, mask, ids, targets)


def _read_pixels(path: Path, size: int, max_pixels: int, rng: random.Random) -> NDArray[np.uint8]:
    try:
        return ImageTransform(size, None, max_pixels)(path.read_bytes(), rng)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _gaps(trained: Trained, sample: Sample, logits_TV: Tensor, top: int) -> tuple[Gap, ...]:
    encoder = trained.tokenizers.text
    assert sample.text_ids is not None
    places = np.flatnonzero(sample.text_ids == encoder.mask_id)
    words = torch.tensor(encoder.word_ids)
    probabilities = logits_TV.float()[:, words].softmax(-1)
    gaps = []
    for number, place in enumerate(places):
        best = probabilities[place].topk(min(top, len(words)))
        named = [encoder.id_to_token(int(words[i])) for i in best.indices]
        gaps.append(Gap(number, tuple(zip(named, best.values.tolist(), strict=True))))
    return tuple(gaps)


def _picture(
    trained: Trained, pixels_CHW: NDArray[np.uint8], mask_P: NDArray[np.bool_], logits_IPC: Tensor
) -> Image.Image:
    """Original, hidden and filled, side by side.

    Patches that are seen have the codes that the tokenizer gives them, in whose sight others may be drawn.
    """
    visual = trained.tokenizers.visual
    assert visual is not None, "_undrawn says so"
    seen_1P = visual.encode(torch.from_numpy(pixels_CHW)[None])
    codes = torch.where(torch.from_numpy(mask_P), logits_IPC.argmax(-1), seen_1P)
    grid, size = trained.recipe.model.grid, trained.recipe.model.patch_size
    drawn = (visual.decode(codes, (grid, grid))[0] * 255).round().byte().numpy()
    hidden = mask_P.reshape(grid, grid).repeat(size, 0).repeat(size, 1)
    panels = [pixels_CHW, np.where(hidden, np.uint8(VEIL), pixels_CHW), np.where(hidden, drawn, pixels_CHW)]
    return side_by_side([panel.transpose(1, 2, 0) for panel in panels])


def side_by_side(panels: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Pictures (H, W, 3) in a row on white, at least 192 pixels high, enlarged by whole factors."""
    factor = max(1, -(-192 // panels[0].shape[0]))
    images = [Image.fromarray(p.repeat(factor, 0).repeat(factor, 1)) for p in panels]
    width, height = images[0].size
    row = Image.new("RGB", (len(images) * (width + GAP) + GAP, height + 2 * GAP), "white")
    for number, image in enumerate(images):
        row.paste(image, (GAP + number * (width + GAP), GAP))
    return row


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whatever the name ends in. Raises UsageError if it can't be written."""
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise UsageError(f"the picture can't be written to {path}: {error.strerror}; choose another --out") from error
