"""What finetuning starts from: the weights of another run, converted where that can be, refused by name where not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmoe_core.checkpoint.layout import RECIPE, resolve
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.errors import CheckpointError, RecipeError, UsageError
from vlmoe_core.model.embeddings import resize_positions
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import LoadedRecipe, load_recipe, read_recipe
from vlmoe_core.recipe.mistakes import validated
from vlmoe_core.recipe.tree import KeyPath, Node, descendants, dotted, merged, plain
from vlmoe_core.tasks.labels import Labels, load_labels
from vlmoe_core.tokenizers.text import TextTokenizer, load_text_tokenizer

SCRATCH = "scratch"
ENCODER = "encoder."
CONTRAST = "contrast"
IMAGE_POSITIONS = "encoder.embeddings.image.position"
TEXT_POSITIONS = "encoder.embeddings.text.position"
CONVERTED = frozenset({IMAGE_POSITIONS, TEXT_POSITIONS})
"""Tensors whose number of rows may differ."""
CHANGEABLE = ("image_size", "max_text_length", "drop_path")
"""Fields of a model that finetuning may change; and everything of its sparse layers that is no size."""
SIZES_OF_EXPERTS = ("num_experts", "layers", "shared_expert")


def load_run_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    model: Path | None = None,
    base_of: Callable[[str], Path] | None = None,
) -> LoadedRecipe:
    """Read a recipe of any kind; where it finetunes, `model` and `tokenizers` of its `init` are the base of its own.

    Args:
        name_or_path: as in `load_recipe`.
        overrides: likewise.
        model: beats the recipe's `init`.
        base_of: the recipe file of what `init` names; null: that in its newest checkpoint.

    Raises:
        RecipeError: it is not valid, or its `model` is of another size than that of `init`.
        UsageError, CheckpointError: there is no such recipe or model.
    """
    read = read_recipe(name_or_path, (*overrides, *([f"init={model}"] if model else [])))
    init, task, tree = read.tree.child("init"), read.tree.child("task"), read.tree
    finetunes = task is not None and task.value is not None
    if finetunes and init is not None and isinstance(init.value, str) and init.value != SCRATCH:
        tree = over_base(tree, read_recipe(str((base_of or _recipe_of)(init.value))).tree, init.value)
    return LoadedRecipe(validated(Recipe, tree, str(read.path)), read.name, read.text, read.path)


def _recipe_of(init: str) -> Path:
    try:
        return resolve(Path(init)) / RECIPE
    except UsageError as error:
        raise UsageError(
            f"init: {error}. It is what finetuning starts from: pretrain it first, name another with --model, or start "
            "from scratch with --set init=scratch and a whole model in the recipe"
        ) from error


def over_base(own: Node, base: Node, init: str) -> Node:
    """A recipe's tree, its `model` merged over that of the recipe of `init`, whose `tokenizers` it takes.

    Raises RecipeError for other tokenizers, and for a size that the weights of `init` don't have.
    """
    kept = {name: node for name in ("model", "tokenizers") if (node := base.child(name)) is not None}
    if "model" not in kept:
        raise CheckpointError(f"the recipe of {init} has no model")
    tokenizers = own.child("tokenizers")
    if tokenizers is not None and (
        "tokenizers" not in kept or plain(merged(kept["tokenizers"], tokenizers)) != plain(kept["tokenizers"])
    ):
        raise RecipeError(
            f"{tokenizers.place}: tokenizers: come with the model that finetuning starts from ({init}); take these "
            "lines out, or start from scratch"
        )
    if (model := own.child("model")) is not None:
        _check_sizes(kept["model"], model, init)
    return merged(Node(kept, base.place), own)


def _check_sizes(base: Node, own: Node, init: str) -> None:
    """Raises RecipeError for a size that the weights have and the recipe says otherwise."""
    known = {dotted(key): plain(node) for key, node in descendants(base)}
    for key, node in descendants(own):
        name, said = dotted(key), plain(node)
        if _is_size(key, node) and known.get(name) != said:
            raise RecipeError(
                f"{node.place}: model.{name} is {said}, but {known.get(name)} in {init}; take the line "
                f"out. Finetuning may change {', '.join(CHANGEABLE)} and settings of the routers"
            )


def _is_size(key: KeyPath, node: Node) -> bool:
    """Whether a value below `model` decides on the shapes of the weights."""
    if key[0] != "moe":
        return key[0] not in CHANGEABLE
    return key[2] in SIZES_OF_EXPERTS if len(key) == 3 else len(key) < 3 and not isinstance(node.value, dict)


@dataclass(frozen=True)
class Start:
    """A model that finetuning starts from."""

    checkpoint: Checkpoint
    """Its weights."""
    recipe: Recipe
    """The recipe of its run."""
    labels: Labels
    """What its head chooses from, if it was finetuned."""

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """Its text tokenizer."""
        return load_text_tokenizer(str(self.checkpoint.tokenizers / "text"))


def open_start(init: str | None) -> Start | None:
    """The model that `init` names; null for `scratch`, and in pretraining."""
    if init is None or init == SCRATCH:
        return None
    checkpoint = read_checkpoint(resolve(Path(init)))
    recipe = load_recipe(str(checkpoint.path / RECIPE)).recipe
    return Start(checkpoint, recipe, load_labels(checkpoint.tokenizers / "labels"))


@torch.no_grad()
def start_from(objective: nn.Module, start: Start, recipe: Recipe, labels: Labels) -> list[str]:
    """Copy the weights of `start` into an objective.

    Image positions of another resolution are interpolated, text positions of another length cut or extended, heads
    of another task, of other labels or of another shape left as they were initialised.

    Returns:
        A line for each thing that was not copied as it is.

    Raises:
        CheckpointError: a tensor of the encoder is missing, unknown or of another shape; nothing was copied then.
    """
    targets: dict[str, Tensor] = objective.state_dict()
    found = start.checkpoint.model
    wanted = {name for name in targets if name.startswith(ENCODER)}
    _check_encoder(targets, found, wanted, start)
    wanted |= _heads(targets, found, _same_task(start, recipe, labels))
    notes = list(_convert_positions(targets, found))
    for name in wanted - CONVERTED:
        targets[name].copy_(found[name])
    fresh = sorted({_part(name) for name in targets if name not in wanted})
    left = sorted({_part(name) for name in found if name not in targets or name not in wanted})
    notes += [f"new, not from {start.checkpoint.path}: {', '.join(fresh)}"] if fresh else []
    notes += [f"left out of {start.checkpoint.path}: {', '.join(left)}"] if left else []
    return notes


def _same_task(start: Start, recipe: Recipe, labels: Labels) -> bool:
    """Whether both were finetuned on one task, with one list of labels."""
    before, now = start.recipe.task, recipe.task
    return before is not None and now is not None and before.name == now.name and start.labels == labels


def _heads(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], same_task: bool) -> set[str]:
    """The tensors of the heads that can be copied: each head whole or not at all."""
    heads: dict[str, list[str]] = {}
    for name in targets:
        if not name.startswith(ENCODER):
            heads.setdefault(_part(name), []).append(name)
    fits = {
        head: all(name in found and found[name].shape == targets[name].shape for name in names)
        for head, names in heads.items()
    }
    return {name for head, names in heads.items() if fits[head] and (same_task or head == CONTRAST) for name in names}


def _convert_positions(targets: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Fill the position tables; a line for each that changed."""
    image, old = targets[IMAGE_POSITIONS], found[IMAGE_POSITIONS]
    grid, before = round((image.shape[0] - 1) ** 0.5), round((old.shape[0] - 1) ** 0.5)
    image.copy_(resize_positions(old, grid))
    if grid != before:
        yield f"image positions interpolated from {before} x {before} to {grid} x {grid} patches"
    text, old = targets[TEXT_POSITIONS], found[TEXT_POSITIONS]
    rows = min(text.shape[0], old.shape[0])
    text[:rows] = old[:rows]
    if text.shape[0] < old.shape[0]:
        yield f"text positions cut from {old.shape[0]} to {rows}"
    elif text.shape[0] > old.shape[0]:
        yield f"text positions extended from {rows} to {text.shape[0]}: the new ones are random"


def _check_encoder(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], wanted: set[str], start: Start) -> None:
    """Raises CheckpointError for a tensor that is missing, unknown or of another shape."""
    missing = sorted(name for name in wanted if name not in found)
    foreign = sorted(name for name in found if name.startswith(ENCODER) and name not in targets)
    misfits = [
        f"{name} is {tuple(found[name].shape)}, the recipe's model wants {tuple(targets[name].shape)}"
        for name in sorted(wanted)
        if name in found and not _fits(name, found[name], targets[name])
    ]
    told = [f"missing: {_listed(missing)}"] if missing else []
    told += [f"not in the recipe's model: {_listed(foreign)}"] if foreign else []
    told += [_listed(misfits)] if misfits else []
    if told:
        raise CheckpointError(f"{start.checkpoint.path} can't start this recipe; {'; '.join(told)}")


def _fits(name: str, found: Tensor, target: Tensor) -> bool:
    """Whether a tensor has the shape; a table of positions may have more or fewer rows."""
    first = 1 if name in CONVERTED else 0
    return found.dim() == target.dim() and found.shape[first:] == target.shape[first:]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _part(name: str) -> str:
    """The head that a tensor belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
