"""What a run starts from: the weights of another model, converted where that can be, refused by name where not."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe_core.checkpoint.held import Held, held_tensors
from vlmoe_core.checkpoint.layout import RECIPE
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.checkpoint.stored import pieces, shape_of
from vlmoe_core.errors import CheckpointError, RecipeError, UsageError
from vlmoe_core.hf import shown
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.embeddings import resize_positions
from vlmoe_core.model.relative import resize_relative
from vlmoe_core.recipe.catalogue import shipped
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.load import LoadedRecipe, RecipeText, load_model_recipe, read_recipe
from vlmoe_core.recipe.mistakes import validated
from vlmoe_core.recipe.tree import KeyPath, Node, descendants, dotted, merged, plain
from vlmoe_core.tasks.labels import Labels, load_labels
from vlmoe_core.tokenizers.text import TextTokenizer, load_text_tokenizer
from vlmoe_core.tokenizers.visual import KINDS, load_visual_tokenizer
from vlmoe_core.train.fitting import Given
from vlmoe_core.train.folder import default_folder
from vlmoe_core.train.visual import no_model

SCRATCH = "scratch"
ENCODER = "encoder."
CONTRAST = "contrast"
CODES = "heads.image"
IMAGE_POSITIONS = "encoder.embeddings.image.position"
TEXT_POSITIONS = "encoder.embeddings.text.position"
RELATIVE = ".relative.table"
CONVERTED = (IMAGE_POSITIONS, TEXT_POSITIONS, RELATIVE)
"""How the names of tensors end whose number of rows may differ."""
CHANGEABLE = ("image_size", "max_text_length", "drop_path")
"""Fields of a model that finetuning may change; and everything of its sparse layers that is no size."""
SIZES_OF_EXPERTS = ("num_experts", "layers", "shared_expert", "kept_experts")


def load_run_recipe(name_or_path: str, overrides: Sequence[str] = (), model: Path | None = None) -> LoadedRecipe:
    """Read a recipe of any kind; `model` and `tokenizers` of its `init`, where it names one, are the base of its own.

    Args:
        name_or_path: as in `load_recipe`.
        overrides: likewise.
        model: beats the recipe's `init`.

    Raises:
        RecipeError: it is not valid, or its `model` is of another size than that of `init`.
        UsageError, CheckpointError: there is no such recipe or model.
    """
    read = _read(name_or_path, overrides, model)
    init = _init_of(read.tree)
    tree = read.tree if init is None else over_base(read.tree, read_recipe(str(_recipe_of(init))).tree, init)
    return _loaded(read, tree)


@dataclass(frozen=True)
class Planned:
    """The recipe of a run whose `init` may be a run that nobody has made yet."""

    loaded: LoadedRecipe
    """The recipe."""
    start: str | None
    """What stands in for the run that it starts from; null: nothing does."""


def load_planned_recipe(name_or_path: str, overrides: Sequence[str] = (), model: Path | None = None) -> Planned:
    """As `load_run_recipe`, for verbs that read nothing but recipes: the run that `init` names need not be there.

    The shipped recipe whose default run folder it is then gives `model` and `tokenizers`; its own `init` likewise.
    Arguments and errors as for `load_run_recipe`.
    """
    read = _read(name_or_path, overrides, model)
    init = _init_of(read.tree)
    if init is None:
        return Planned(_loaded(read, read.tree), None)
    base, names = _planned_base(init)
    start = f"{init} is not there; shipped recipes give its model: {', over '.join(names)}" if names else None
    return Planned(_loaded(read, over_base(read.tree, base, init)), start)


def _planned_base(init: str) -> tuple[Node, tuple[str, ...]]:
    """The tree of the recipe of `init`, and the shipped recipes that stand in for its run, the nearest first."""
    try:
        return read_recipe(str(_recipe_of(init))).tree, ()
    except UsageError:
        name = next((name for name in shipped().names() if default_folder(name) == Path(init)), None)
        if name is None:
            raise
    tree = read_recipe(name).tree
    before = _init_of(tree)
    if before is None:
        return tree, (name,)
    base, names = _planned_base(before)
    return over_base(tree, base, before), (name, *names)


def _read(name_or_path: str, overrides: Sequence[str], model: Path | None) -> RecipeText:
    return read_recipe(name_or_path, (*overrides, *([f"init={model}"] if model else [])))


def _loaded(read: RecipeText, tree: Node) -> LoadedRecipe:
    return LoadedRecipe(validated(Recipe, tree, str(read.path)), read.name, read.text, read.path)


def _init_of(tree: Node) -> str | None:
    """The model that a recipe starts from; null: none. A value that is no text is told where it is validated."""
    init = tree.child("init")
    return init.value if init is not None and isinstance(init.value, str) and init.value != SCRATCH else None


def _recipe_of(init: str) -> Path:
    try:
        return resolve(Path(init)) / RECIPE
    except UsageError as error:
        raise UsageError(
            f"init: {error}. It is what the run starts from: pretrain it first, name another with --set "
            "init=RUN, or start from scratch with --set init=scratch and a whole model in the recipe"
        ) from error


def over_base(own: Node, base: Node, init: str) -> Node:
    """A recipe's tree, its `model` merged over that of the recipe of `init`, whose `tokenizers` it takes.

    Raises RecipeError for other tokenizers, and for a size that the weights of `init` don't have; UsageError for a
    visual tokenizer, where the run trains none.
    """
    kept = {name: node for name in ("model", "tokenizers") if (node := base.child(name)) is not None}
    if "model" not in kept:
        raise CheckpointError(f"the recipe of {init} has no model")
    _check_aim(base, own, init)
    _check_tokenizers(kept.get("tokenizers"), own, init)
    if (model := own.child("model")) is not None:
        _check_sizes(kept["model"], model, init)
    return merged(Node(kept, base.place), own)


def _check_aim(base: Node, own: Node, init: str) -> None:
    """Raises UsageError where `init` is a visual tokenizer, and the run trains none."""
    before, now = _objective_of(base), _objective_of(own)
    if before in KINDS and now != before:  # an objective that trains a tokenizer has the name of its kind
        raise no_model(init)


def _objective_of(tree: Node) -> object:
    objective = tree.child("objective")
    name = objective.child("name") if objective is not None else None
    return None if name is None else name.value


def _check_tokenizers(base: Node | None, own: Node, init: str) -> None:
    """Raises RecipeError for other tokenizers than those of `init`; pretraining may have a visual one of its own."""
    tokenizers, task = own.child("tokenizers"), own.child("task")
    said = plain(tokenizers) if tokenizers is not None else None
    if tokenizers is None or not isinstance(said, dict):
        return
    kept: dict[str, Any] = plain(base) if base is not None else {}
    free = {"visual"} if task is None or task.value is None else set()
    for name in said.keys() - free:
        if name not in kept or {**kept[name], **(said[name] or {})} != kept[name]:
            raise RecipeError(
                f"{tokenizers.place}: tokenizers: {name}: comes with the model that the run starts from ({init}); take "
                "these lines out, or start from scratch"
            )


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
    """A model that a run starts from."""

    checkpoint: Checkpoint
    """Its weights."""
    recipe: ModelRecipe
    """The recipe of its run; an imported encoder's says model and tokenizers alone."""
    labels: Labels
    """What its head chooses from, if it was finetuned."""

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """Its text tokenizer."""
        return load_text_tokenizer(str(self.checkpoint.tokenizers / "text"))

    def tokenizers(self, recipe: Recipe) -> Given:
        """The tokenizers that a run takes over; the visual one in pretraining that asks for no other."""
        visual = load_visual_tokenizer(self._visual) if self.gives_codes(recipe) else None
        return Given(self.text_tokenizer, visual)

    def gives_codes(self, recipe: Recipe) -> bool:
        """Whether a run with this recipe predicts the visual codes of this model."""
        alike = recipe.tokenizers.visual.origin == self.recipe.tokenizers.visual.origin
        return recipe.task is None and alike and self._visual.exists()

    @property
    def _visual(self) -> Path:
        return self.checkpoint.tokenizers / "visual"


def open_start(init: str | None) -> Start | None:
    """The model that `init` names; null for `scratch`, and where it names none."""
    if init is None or init == SCRATCH:
        return None
    checkpoint = read_checkpoint(resolve(Path(init)))
    recipe = load_model_recipe(checkpoint.path / RECIPE)
    return Start(checkpoint, recipe, load_labels(checkpoint.tokenizers / "labels"))


@torch.no_grad()
def start_from(objective: nn.Module, start: Start, recipe: Recipe, labels: Labels) -> list[str]:
    """Copy the weights of `start` into an objective; of what is shared or sharded this process's part.

    Image positions of another resolution are interpolated, text positions of another length cut or extended (those of
    relative tables likewise), heads of another task or objective, of other labels, codes or shape left as they were
    initialised.

    Returns:
        A line for each thing that was not copied as it is.

    Raises:
        CheckpointError: a tensor of the encoder is missing, unknown or of another shape; nothing was copied then.
    """
    targets = held_tensors(objective)
    found = start.checkpoint.model
    wanted = {name for name in targets if name.startswith(ENCODER)}
    _check_encoder(targets, found, wanted, start)
    wanted |= _heads(targets, found, _kept_heads(start, recipe, labels))
    notes = list(_convert_positions(targets, found))
    notes += _convert_relative(targets, found, start.recipe.model, recipe.model)
    alike = {name: targets[name].box for name in wanted if not name.endswith(CONVERTED)}
    for piece in pieces(found, alike):
        piece.place(targets[piece.name].local).copy_(piece.tensor)
    fresh = sorted({_part(name) for name in targets if name not in wanted})
    left = sorted({_part(name) for name in found if name not in targets or name not in wanted})
    notes += [f"new, not from {shown(start.checkpoint.path)}: {', '.join(fresh)}"] if fresh else []
    notes += [f"left out of {shown(start.checkpoint.path)}: {', '.join(left)}"] if left else []
    return notes


def _kept_heads(start: Start, recipe: Recipe, labels: Labels) -> Callable[[str], bool]:
    """Which heads mean the same in both models: all of one task with one list of labels; those of one objective, that
    of the visual codes only with one visual tokenizer; contrast always. What came along with an encoder whose recipe
    names neither may mean anything."""
    before = start.recipe
    if not isinstance(before, Recipe):
        return lambda head: head == CONTRAST
    if before.task is not None and recipe.task is not None:
        same = before.task.name == recipe.task.name and start.labels == labels
        return lambda head: same or head == CONTRAST
    if before.objective is not None and recipe.objective is not None:
        same, codes = before.objective.name == recipe.objective.name, start.gives_codes(recipe)
        return lambda head: head == CONTRAST or (same and (codes or head != CODES))
    return lambda head: head == CONTRAST


def _heads(targets: Mapping[str, Held], found: Mapping[str, Tensor], kept: Callable[[str], bool]) -> set[str]:
    """The tensors of the heads that can be copied: each head whole or not at all."""
    heads: dict[str, list[str]] = {}
    for name in targets:
        if not name.startswith(ENCODER):
            heads.setdefault(_part(name), []).append(name)
    fits = {
        head: all(name in found and shape_of(found, name) == targets[name].shape for name in names)
        for head, names in heads.items()
    }
    return {name for head, names in heads.items() if fits[head] and kept(head) for name in names}


def _convert_positions(targets: Mapping[str, Held], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Fill the absolute position tables of the modalities that there are; a line for each that changed."""
    if IMAGE_POSITIONS in targets:
        image, old = targets[IMAGE_POSITIONS], found[IMAGE_POSITIONS]
        grid, before = math.isqrt(image.shape[0] - 1), math.isqrt(old.shape[0] - 1)
        image.take(resize_positions(old, grid))
        if grid != before:
            yield f"image positions interpolated from {before} x {before} to {grid} x {grid} patches"
    if TEXT_POSITIONS in targets:
        text, old = targets[TEXT_POSITIONS], found[TEXT_POSITIONS]
        rows = min(text.shape[0], old.shape[0])
        text.take(old[:rows])
        if text.shape[0] < old.shape[0]:
            yield f"text positions cut from {old.shape[0]} to {rows}"
        elif text.shape[0] > old.shape[0]:
            yield f"text positions extended from {rows} to {text.shape[0]}: the new ones are random"


def _convert_relative(
    targets: Mapping[str, Held], found: Mapping[str, Tensor], before: ModelConfig, now: ModelConfig
) -> Iterator[str]:
    """Fill the relative tables, if there are any; a line for what changed in all of them."""
    tables = [name for name in targets if name.endswith(RELATIVE)]
    (old_grid, old_text), (grid, text) = ((model.grid, model.max_text_length) for model in (before, now))
    for name in tables:
        targets[name].take(resize_relative(found[name], old_grid, grid, old_text, text))
    if tables and grid != old_grid:
        yield f"relative positions interpolated from {old_grid} x {old_grid} to {grid} x {grid} patches"
    if tables and text < old_text:
        yield f"relative text positions cut from {old_text} to {text}"
    elif tables and text > old_text:
        yield f"relative text positions extended from {old_text} to {text}: the new ones are as the furthest"


def _check_encoder(targets: Mapping[str, Held], found: Mapping[str, Tensor], wanted: set[str], start: Start) -> None:
    """Raises CheckpointError for a tensor that is missing, unknown or of another shape."""
    missing = sorted(name for name in wanted if name not in found)
    foreign = sorted(name for name in found if name.startswith(ENCODER) and name not in targets)
    misfits = [
        f"{name} is {shape_of(found, name)}, the recipe's model wants {targets[name].shape}"
        for name in sorted(wanted)
        if name in found and not _fits(name, shape_of(found, name), targets[name])
    ]
    told = [f"missing: {_listed(missing)}"] if missing else []
    told += [f"not in the recipe's model: {_listed(foreign)}"] if foreign else []
    told += [_listed(misfits)] if misfits else []
    if told:
        raise CheckpointError(f"{shown(start.checkpoint.path)} can't start this recipe; {'; '.join(told)}")


def _fits(name: str, found: tuple[int, ...], target: Held) -> bool:
    """Whether a tensor has the shape; a table of positions may have more or fewer rows."""
    first = 1 if name.endswith(CONVERTED) else 0
    return len(found) == len(target.shape) and found[first:] == target.shape[first:]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _part(name: str) -> str:
    """The head that a tensor belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
