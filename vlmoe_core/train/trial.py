"""What a trial step computes on: the first examples of a run's data, or noise of its sizes where nothing is opened."""

from collections.abc import Mapping
from dataclasses import dataclass

from vlmoe_core.data.config import STREAMS, SplitConfig, StreamName
from vlmoe_core.data.loader import MicroBatch, MicroBatches, load
from vlmoe_core.data.prepare import Preparer
from vlmoe_core.data.stream import Stream
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.labels import NO_LABELS, Labels
from vlmoe_core.tasks.task import open_task
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.teachers.teacher import Teacher
from vlmoe_core.tokenizers.visual import VisualTokenizer
from vlmoe_core.train.build import micro_sizes, recipe_preparer
from vlmoe_core.train.fitting import check_streams, obtain_visual
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.stand_ins import NoiseTeacher, NumberEncoder, noise_streams, stand_in_labels

MOST_DRAWN = 4
"""Examples of each stream in the trial batches."""
TRIAL_TEXTS = 200
TRIAL_IMAGES = 16


@dataclass(frozen=True)
class Inputs:
    """Of a trial step."""

    micro: MicroBatch
    """The examples."""
    visual: VisualTokenizer | None
    """Says what hidden patches were; null: none are hidden."""
    labels: Labels = NO_LABELS
    """What the head of a task chooses from."""
    teacher: Teacher | None = None
    """Stands in for the one that the objective learns from; null: none does."""


def noise_inputs(recipe: Recipe) -> Inputs:
    """Random examples, and what stands in for tokenizers, labels and teacher.

    Raises RecipeError where `data` has no sources of the task's stream, or of others.
    """
    labels = stand_in_labels(recipe)
    if recipe.task is not None:
        check_streams(recipe, open_task(recipe.task).stream)
    streams = noise_streams(recipe, labels)
    preparer = recipe_preparer(recipe, NumberEncoder(recipe.tokenizers.text.vocab_size), labels, training=True)
    micro = draw(recipe, streams, recipe.data.train, preparer)
    trial = with_small_fits(_without_named_tokenizers(recipe))
    visual = obtain_visual(trial, streams.values(), Reporter()) if recipe.hides else None
    return Inputs(micro, visual, labels, _noise_teacher(recipe))


def with_small_fits(recipe: Recipe) -> Recipe:
    """The recipe, its tokenizers fitted on a few examples."""
    text, visual = recipe.tokenizers.text, recipe.tokenizers.visual
    if text.load is None:
        text = text.model_copy(update={"fit_texts": min(text.fit_texts, TRIAL_TEXTS)})
    if visual.is_fitted:
        codes = min(visual.codebook_size, max(2, recipe.model.num_patches))
        images = min(visual.fit_images, TRIAL_IMAGES)
        visual = visual.model_copy(update={"codebook_size": codes, "fit_images": images, "iterations": 1})
    tokenizers = recipe.tokenizers.model_copy(update={"text": text, "visual": visual})
    return recipe.model_copy(update={"tokenizers": tokenizers})


def draw(recipe: Recipe, streams: Mapping[StreamName, Stream], split: SplitConfig, preparer: Preparer) -> MicroBatch:
    """The first examples of each stream of a split as a micro-batch, made in this process."""
    names = STREAMS if recipe.task is None else (open_task(recipe.task).stream,)
    sizes = {stream: min(size, MOST_DRAWN) for stream, size in micro_sizes(recipe, split).items()}
    image_size, patches = recipe.model.image_size, recipe.model.num_patches
    dataset = MicroBatches(streams, sizes, preparer, image_size, patches, limit=MOST_DRAWN, names=names)
    return next(load(dataset, [0], recipe.data.model_copy(update={"workers": 0})))


def _without_named_tokenizers(recipe: Recipe) -> Recipe:
    visual = recipe.tokenizers.visual.model_copy(update={"load": None, "tokens": None, "kind": "codebook"})
    return recipe.model_copy(update={"tokenizers": recipe.tokenizers.model_copy(update={"visual": visual})})


def _noise_teacher(recipe: Recipe) -> Teacher | None:
    """In place of a teacher whose weights lie in files."""
    config = getattr(recipe.objective, "teacher", None)
    if not isinstance(config, TeacherConfig) or config.dim is None:
        return None
    return NoiseTeacher(config.dim, recipe.model.num_patches)
