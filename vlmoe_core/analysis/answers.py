"""What a finetuned model answers to a user's own pictures and texts.

Axis letters: X examples, N pictures, M texts.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import collate
from vlmoe_core.data.example import Example
from vlmoe_core.data.files import IMAGE_SUFFIXES, checked_text, inside, lines, parse_object, read_file
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.objectives.contrastive import alone
from vlmoe_core.tasks.kinds.retrieval import Matching
from vlmoe_core.tasks.task import Ranked, Task, open_task
from vlmoe_core.train.build import recipe_preparer
from vlmoe_core.train.trained import Trained

BATCH = 32
TEXT_FIELDS = ("text", "question", "statement", "premise")
"""Fields of a line that hold its text."""


@dataclass(frozen=True)
class Match:
    """How well a picture and a text go together."""

    image: str
    """The picture."""
    text: str
    """The text."""
    similarity: float
    """Cosine of the dual encoder's vectors."""
    match: float | None
    """Probability that they belong together, of the fused encoder; null without a matching head."""


def answer(trained: Trained, examples: Sequence[Example]) -> list[Ranked]:
    """The most probable labels for each example.

    Raises DataError, naming the example, where a picture can't be read, or a picture or a text is missing.
    """
    assert trained.recipe.task is not None
    task = open_task(trained.recipe.task)
    for example in examples:
        _refuse_incomplete(trained, task, example)
    answers: list[Ranked] = []
    for start in range(0, len(examples), BATCH):
        with torch.no_grad():
            loss = trained.objective({task.stream: batch_of(trained, examples[start : start + BATCH])})
        answers += task.read(loss.outputs, trained.tokenizers.labels)
    return answers


def _refuse_incomplete(trained: Trained, task: Task, example: Example) -> None:
    """Raises DataError for an example without its second sentence, or with another number of pictures."""
    if task.stream == "text":
        if example.second_text is None:
            raise DataError(f"{example.name}: has no hypothesis; the task judges pairs of sentences")
        return
    found, wanted = (example.image is not None) + len(example.more_images), trained.objective.num_images
    if found != wanted:
        raise DataError(f"{example.name}: has {found} pictures, the model takes {wanted}")


def batch_of(trained: Trained, examples: Iterable[Example]) -> Batch:
    """The examples as the model gets them, without what is true of them."""
    assert trained.recipe.task is not None
    recipe, task = trained.recipe, open_task(trained.recipe.task)
    preparer = recipe_preparer(recipe, trained.tokenizers.text, trained.tokenizers.labels, training=False)
    samples = [preparer(task.stream, n, example, random.Random(0)) for n, example in enumerate(examples)]
    return collate(task.stream, samples, recipe.model.image_size, recipe.model.num_patches)


def match(trained: Trained, images: Sequence[Example], texts: Sequence[str], top: int | None = None) -> list[Match]:
    """The pairs of a picture and a text that are most alike, the best first.

    Every picture and every text is encoded once alone, and the pairs that are returned once together.

    Args:
        trained: a model of retrieval.
        images: the pictures.
        texts: the texts.
        top: at most so many pairs; null: all.
    """
    if not images or not texts:
        return []
    pairs = list(product(images, texts))
    cosines = _cosines(trained, images, texts)
    best = cosines.argsort(descending=True, stable=True)[:top]
    chosen = [pairs[place] for place in best.tolist()]
    rows = zip(chosen, cosines[best].tolist(), _matches(trained, chosen), strict=True)
    return [Match(image.name, text, cosine, together) for (image, text), cosine, together in rows]


@torch.no_grad()
def _cosines(trained: Trained, images: Sequence[Example], texts: Sequence[str]) -> Tensor:
    """(N M,) of every picture with every text."""
    objective = _matching(trained)
    shown = _batches(trained, [(image, texts[0]) for image in images])
    said = _batches(trained, [(images[0], text) for text in texts])
    image_ND = torch.cat([objective.embed_images(alone(batch)["image"]) for batch in shown])
    text_MD = torch.cat([objective.embed_texts(alone(batch)["text"]) for batch in said])
    return (image_ND @ text_MD.T).flatten()


@torch.no_grad()
def _matches(trained: Trained, pairs: Sequence[tuple[Example, str]]) -> list[float | None]:
    """Probability that each pair belongs together; null without a matching head."""
    objective = _matching(trained)
    if not objective.config.itm_weight:
        return [None] * len(pairs)
    logits_P2 = torch.cat([objective.match_logits(batch) for batch in _batches(trained, pairs)])
    found: list[float | None] = logits_P2.softmax(dim=-1)[:, 1].tolist()
    return found


def _matching(trained: Trained) -> Matching:
    assert isinstance(trained.objective, Matching), "a model of retrieval matches pictures and texts"
    return trained.objective


def _batches(trained: Trained, pairs: Sequence[tuple[Example, str]]) -> Iterator[Batch]:
    for start in range(0, len(pairs), BATCH):
        yield batch_of(trained, [replace(image, text=text) for image, text in pairs[start : start + BATCH]])


def picture(path: Path) -> Example:
    """A picture in a file. Raises DataError if there is none."""
    return Example(str(path), read_file(path, str(path)))


def pictures(paths: Sequence[Path]) -> list[Example]:
    """The pictures in files and, sorted by name, in folders. Raises UsageError where there are none."""
    files = [file for path in paths for file in (_in_folder(path) if path.is_dir() else [path])]
    if not files:
        raise UsageError(f"no pictures in {', '.join(map(str, paths)) or 'nothing'}; give files or folders")
    return [picture(file) for file in files]


def _in_folder(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES)


def read_examples(path: Path) -> Iterator[Example]:
    """The lines of a JSON lines file.

    Each has `image` or `images` (paths that start from the file's folder), its text as `text`, `question`, `statement`
    or `premise`, and `hypothesis`, as the task needs. Raises DataError, naming file and line, for what can't be read.
    """
    if not path.is_file():
        raise UsageError(f"--input {path}: there is no such file; give a JSON lines file")
    for number, _, content in lines(path):
        where = f"{path.name}:{number}"
        fields = parse_object(content, where)
        names = _names(fields, where)
        found = [read_file(inside(name, path.parent, where), where) for name in names]
        key = next((field for field in TEXT_FIELDS if field in fields), None)
        text = checked_text(fields[key], key, where) if key else None
        second = checked_text(fields["hypothesis"], "hypothesis", where) if "hypothesis" in fields else None
        yield Example(
            where, found[0] if found else None, text, number, more_images=tuple(found[1:]), second_text=second
        )


def _names(fields: Mapping[str, Any], where: str) -> list[str]:
    names = fields.get("images", [fields["image"]] if "image" in fields else [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: 'image' must name a picture, and 'images' must be a list of names")
    return names
