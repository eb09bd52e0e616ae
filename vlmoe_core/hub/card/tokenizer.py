"""What the card of a visual tokenizer says otherwise than that of a model."""

from collections.abc import Callable, Iterator
from typing import Any

from vlmoe_core.hub.card.facts import Row, Table, last_held_out, model_name, model_rows, without_empty
from vlmoe_core.hub.card.folder import CardFolder, Line
from vlmoe_core.objectives.kinds.vqkd import Config
from vlmoe_core.tokenizers.teachers.pixels import PIXELS

CODES = "report/codes.json"
Shown = Callable[[Line], str]


def tokenizer_summary(folder: CardFolder, parameters: str) -> str:
    """What it is, in two sentences."""
    return (
        f"A visual tokenizer: it turns each patch of an image into one of {_size(folder):,} codes, the targets of "
        f"masked image modelling. A transformer with {parameters} parameters, trained with vlmoe by vector-quantised "
        f"knowledge distillation (VQ-KD, BEiT v2) to tell {_taught(folder)} from the codes."
    )


def tokenizer_snippet(folder: CardFolder, repo: str) -> str:
    """The lines of a recipe that uses it, and three lines of Python."""
    recipe = f"{{kind: vqkd, load: hf-hub:{repo}, codebook_size: {_size(folder)}}}"
    return "\n".join(
        [
            "In the recipe of a model that is pretrained on its codes:",
            "",
            "```yaml",
            "tokenizers:",
            f"  visual: {recipe}",
            "```",
            "",
            "In Python, for a uint8 tensor of images (batch, 3, height, width):",
            "",
            "```python",
            "from vlmoe_core.train.visual import find_visual_tokenizer",
            "",
            f'codes = find_visual_tokenizer("hf-hub:{repo}").encode(images)',
            "```",
        ]
    )


def tokenizer_rows(folder: CardFolder) -> list[Row]:
    """Sizes of the encoder, the codes and the decoder."""
    config = _config(folder)
    return [
        *model_rows(folder),
        ("Codes", f"{_size(folder):,}, unit vectors of {config.code_dim} numbers"),
        ("Decoder", f"{config.decoder_layers} blocks as wide as the encoder's; needed to train and to draw alone"),
        ("Teacher", _taught(folder)),
    ]


def tokenizer_tables(folder: CardFolder) -> list[Table]:
    """The last held-out line, beside the first and a k-means codebook of equal size."""
    last = last_held_out(folder.metrics)
    if last is None:
        return []
    first = next(line for line in folder.metrics if line["split"] == "eval")
    kmeans = _kmeans(folder, last["step"])
    rows = tuple(
        (name, shown(last), shown(first) if first is not last else "", shown(kmeans)) for name, shown in _figures(last)
    )
    title = f"Held-out images at step {last['step']:,}"
    note = f"The k-means codebook was fitted on {kmeans['fitted_on']:,} of the training images." if kmeans else ""
    head = ("", "this tokenizer", f"step {first['step']:,}", "k-means codebook")
    return [without_empty(Table(title, head, rows, note=note))]


def _figures(last: Line) -> Iterator[tuple[str, Shown]]:
    """What is shown of a line, with how; what the last line has not is left out."""
    known: dict[str, tuple[str, Callable[[Any], str]]] = {
        "codes/used": ("codes in use, percent", lambda share: f"{100 * share:.1f}"),
        "codes/perplexity": ("perplexity of the codes", lambda value: f"{value:.1f}"),
        "loss/teacher": ("cosine to the teacher", lambda distance: f"{1 - distance:.3f}"),
        "codes/pixel_error": ("mean squared error of a pixel in [0, 1]", lambda error: f"{error:.4f}"),
    }
    for key, (name, form) in known.items():
        if key in last:
            yield name, lambda line, key=key, form=form: form(line[key]) if key in line else ""  # type: ignore[misc]


def _kmeans(folder: CardFolder, step: int) -> Line:
    """Of the report on the codes, if it is of this step and compares with k-means."""
    report = folder.json(CODES)
    found = report.get("kmeans")
    if report.get("step") != step or not isinstance(found, dict):
        return {}
    return {"codes/pixel_error": found["mse"], "fitted_on": found["fitted_on"]}


def _config(folder: CardFolder) -> Config:
    assert folder.run is not None and isinstance(folder.run.objective, Config), "the card is that of a tokenizer"
    return folder.run.objective


def _size(folder: CardFolder) -> int:
    return folder.recipe.tokenizers.visual.codebook_size


def _taught(folder: CardFolder) -> str:
    teacher = _config(folder).teacher.model
    return "the pixels of the patches" if teacher == PIXELS else f"the features of {model_name(teacher)}"
