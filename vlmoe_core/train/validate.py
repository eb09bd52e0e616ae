"""What can be known of a run before it starts: recipe, sources, tokenizers, model, one step. And what can't."""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmoe_core.data.check import describe_source
from vlmoe_core.data.config import SPLITS, STREAMS, SplitConfig, StreamName
from vlmoe_core.data.example import TextEncoder
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.data.stream import Stream, open_streams
from vlmoe_core.errors import DataError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import HELD_OUT_SEED, recipe_preparer
from vlmoe_core.train.codes import check_codes, reads_codes
from vlmoe_core.train.fitting import Given, Tokenizers, check_fit, obtain_labels, obtain_text, obtain_visual
from vlmoe_core.train.init import SCRATCH, open_start
from vlmoe_core.train.rehearsal import MOST_PARAMETERS, Parameters, count_parameters, shrunken_model, try_step
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.stand_ins import FirstDocuments, with_first_documents
from vlmoe_core.train.trial import (
    MOST_DRAWN,
    TRIAL_IMAGES,
    TRIAL_TEXTS,
    Inputs,
    draw,
    noise_inputs,
    with_small_fits,
)


@dataclass(frozen=True)
class Check:
    """One thing that was checked, or that was not."""

    name: str
    """What it is about."""
    detail: str
    """What was found, or why it was not checked."""
    done: bool = True
    """False: not checked."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The numbers in `detail`, for machines."""


def validate(loaded: LoadedRecipe, read_data: bool = True, start: str | None = None) -> Iterator[Check]:
    """Check a recipe piece by piece; each check is yielded as soon as it has passed, those not made come last.

    Args:
        loaded: the recipe, whose values are valid already.
        read_data: False opens no source, tokenizer or model: random inputs of the recipe's sizes stand in.
        start: what stood in for the model that the run starts from, when the recipe was loaded; null: nothing did.

    Raises:
        DataError: a source is missing, empty, or gives no readable example.
        TokenizerError: a named tokenizer is missing or does not fit the recipe.
        RecipeError: the data of a task are of another stream.
        TrainError: the step's loss or gradient is not finite.
    """
    recipe = loaded.recipe
    yield _recipe_check(loaded)
    if start is not None:
        yield Check("start", start)
    if read_data:
        tokenizers = _trial_tokenizers(recipe)
        yield from _tokenizer_checks(recipe, tokenizers)
        micro = yield from _data_checks(recipe, tokenizers)
        if reads_codes(recipe):
            yield _codes_check(recipe, tokenizers)
        inputs = Inputs(micro, tokenizers.visual, tokenizers.labels)
    else:
        inputs = noise_inputs(recipe)
        yield _inputs_check(recipe, inputs)
    parameters = count_parameters(recipe, inputs.labels)
    yield _model_check(parameters)
    yield _step_check(recipe, parameters, inputs)
    yield from _not_checked(recipe, parameters, read_data)


def _codes_check(recipe: Recipe, tokenizers: Tokenizers) -> Check:
    positions = check_codes(recipe, tokenizers.visual)
    detail = f"{recipe.tokenizers.visual.tokens}, {positions:,} positions; the crops of the first ones are the run's"
    return Check("stored tokens", detail, figures={"positions": positions})


def _recipe_check(loaded: LoadedRecipe) -> Check:
    recipe = loaded.recipe
    sizes = ", ".join(f"{recipe.batch.size.of(s)} {s}" for s in STREAMS if recipe.batch.size.of(s))
    figures = {"steps": recipe.train.steps, "size": recipe.batch.size.model_dump(), "num_micro": recipe.batch.num_micro}
    detail = (
        f"{loaded.name}, {recipe.train.steps:,} steps of {sizes} examples (micro-batches: {recipe.batch.num_micro})"
    )
    return Check("recipe", detail, figures=figures)


def _trial_tokenizers(recipe: Recipe) -> Tokenizers:
    """Those that the recipe names, loaded; the others fitted on a few examples."""
    trial, start = with_small_fits(recipe), open_start(recipe.init)
    streams = open_streams(recipe.data, recipe.data.train, recipe.seed)
    given = start.tokenizers(recipe) if start else Given()
    text = given.text or obtain_text(trial, streams.values(), Reporter())
    visual = None
    if recipe.hides:
        visual = given.visual or obtain_visual(trial, streams.values(), Reporter())
    tokenizers = Tokenizers(text, visual, obtain_labels(recipe))
    check_fit(recipe if given.visual else trial, tokenizers)
    return tokenizers


def _tokenizer_checks(recipe: Recipe, tokenizers: Tokenizers) -> Iterator[Check]:
    text, visual = recipe.tokenizers.text, recipe.tokenizers.visual
    words = tokenizers.text.vocab_size
    if tokenizers.labels.names:
        yield Check(
            "labels", f"{len(tokenizers.labels.names):,} found", figures={"labels": len(tokenizers.labels.names)}
        )
    if recipe.init not in (None, SCRATCH):
        yield Check("text tokenizer", f"that of {recipe.init}, {words:,} ids", figures={"ids": words})
    elif text.load is not None:
        notes = "".join(f"; {note}" for note in tokenizers.text.notes)
        yield Check(
            "text tokenizer", f"{text.load}, {words:,} ids for {text.vocab_size:,} rows{notes}", figures={"ids": words}
        )
    elif _has_words(recipe):
        yield Check("text tokenizer", f"WordPiece fitted on at most {TRIAL_TEXTS} texts, for this trial only")
    if recipe.hides and not visual.is_fitted:
        yield Check(
            "visual tokenizer",
            f"{visual.load or visual.tokens}, {visual.codebook_size:,} codes",
            figures={"codes": visual.codebook_size},
        )
    elif tokenizers.visual is not None:
        yield Check("visual tokenizer", f"{visual.kind} fitted on at most {TRIAL_IMAGES} images, for this trial only")


def _data_checks(recipe: Recipe, tokenizers: Tokenizers) -> Generator[Check, None, MicroBatch]:
    """Checks of every source and stream; returns the batch of the training streams."""
    drawn: dict[str, MicroBatch] = {}
    for name in SPLITS:
        split: SplitConfig = getattr(recipe.data, name)
        streams = _open(recipe, name, split, tokenizers.text)
        for stream in streams.values():
            yield from _source_checks(f"data.{name}.{stream.name}", stream)
        preparer = recipe_preparer(recipe, tokenizers.text, tokenizers.labels, name == "train")
        micro = drawn[name] = draw(recipe, streams, split, preparer)
        for stream_name in streams:
            count = micro.batches[stream_name].num_examples
            if count == 0:
                raise DataError(f"data.{name}.{stream_name}: no example drawn can be read: {micro.broken[0]}")
            yield Check(f"data.{name}.{stream_name}", f"a batch of {count} drawn", figures={"drawn": count})
        if micro.broken:
            yield Check(f"data.{name}", f"broken examples skipped: {len(micro.broken)}, the first: {micro.broken[0]}")
    return drawn["train"]


def _open(recipe: Recipe, name: str, split: SplitConfig, encoder: TextEncoder) -> Mapping[StreamName, Stream]:
    """The streams of a split. A packing index belongs to one tokenizer: none is built for one fitted for this trial."""
    seed = recipe.seed if name == "train" else HELD_OUT_SEED
    if recipe.task is not None or recipe.tokenizers.text.load is not None:
        return open_streams(recipe.data, split, seed, encoder)
    return {s: with_first_documents(stream) for s, stream in open_streams(recipe.data, split, seed).items()}


def _source_checks(place: str, stream: Stream) -> Iterator[Check]:
    for config, source in zip(stream.configs, stream.sources, strict=True):
        if isinstance(source, FirstDocuments):
            yield Check(place, f"{describe_source(config)}: opened; it is packed once the text tokenizer is fitted")
        else:
            yield Check(
                place, f"{describe_source(config)}: {len(source):,} examples", figures={"examples": len(source)}
            )


def _inputs_check(recipe: Recipe, inputs: Inputs) -> Check:
    made_up = ["random pixels and words stand in for the data (--no-data)"]
    if recipe.task is not None and open_task(recipe.task).known_labels is None:
        made_up.append(f"{len(inputs.labels.names):,} made-up labels for those that the data would give")
    if inputs.teacher is not None:
        made_up.append(f"random features, {inputs.teacher.dim} wide, for the teacher's")
    return Check("inputs", "; ".join(made_up))


def _model_check(parameters: Parameters) -> Check:
    detail = f"{parameters.total:,} parameters, {parameters.active:,} of them active; built on the meta device"
    return Check("model", detail, figures={"parameters": parameters.total, "active_parameters": parameters.active})


def _step_check(recipe: Recipe, parameters: Parameters, inputs: Inputs) -> Check:
    shrunken = _is_shrunken(parameters)
    if shrunken:
        recipe = recipe.model_copy(update={"model": shrunken_model(recipe.model)})
    batches = inputs.micro.batches
    value = try_step(recipe, inputs.visual, batches, inputs.labels, inputs.teacher)
    sizes = ", ".join(f"{b.num_examples} {s}" for s, b in batches.items() if b.num_examples)
    model = (
        f"a model of the same blocks, dim {recipe.model.dim}, hidden {recipe.model.hidden}" if shrunken else "the model"
    )
    if shrunken:
        model += f" (above {MOST_PARAMETERS:,} parameters it is shrunk)"
    detail = f"forward, backward and AdamW of {model} on {sizes} examples; loss {value:.4g}"
    return Check("step", detail, figures={"loss": value, "shrunken": shrunken})


def _is_shrunken(parameters: Parameters) -> bool:
    return parameters.total > MOST_PARAMETERS


def _not_checked(recipe: Recipe, parameters: Parameters, read_data: bool) -> Iterator[Check]:
    for name, detail in _open_questions(recipe, parameters, read_data).items():
        yield Check(name, detail, done=False)


def _has_words(recipe: Recipe) -> bool:
    return bool(recipe.data.train.text or recipe.data.train.pair)


def _fitted(recipe: Recipe) -> list[str]:
    """The tokenizers that the run will fit: neither loaded nor taken over from the model that it starts from."""
    start, tokenizers = open_start(recipe.init), recipe.tokenizers
    gives_codes = start is not None and start.gives_codes(recipe)
    fits = {
        "text": start is None and tokenizers.text.load is None and _has_words(recipe),
        "visual": recipe.hides and not gives_codes and tokenizers.visual.is_fitted,
    }
    return [name for name, is_fitted in fits.items() if is_fitted]


def _open_questions(recipe: Recipe, parameters: Parameters, read_data: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    if not read_data:
        found["data and tokenizers"] = "nothing but the recipe was opened (--no-data)"
    else:
        found["later data"] = (
            f"at most {MOST_DRAWN} examples of each stream were read; vlmoe data check reads the others"
        )
        if fitted := _fitted(recipe):
            found["tokenizers"] = f"the whole fit ({' and '.join(fitted)}), and packs of sentences that follow from it"
    found["batch"] = "the full batch and micro-batches; memory that they need"
    if _is_shrunken(parameters):
        found["model size"] = "arithmetic and memory of the model at its full size"
    found["devices"] = "GPUs, several processes, speed"
    if recipe.train.precision == "fp16":
        found["precision"] = "fp16, which needs a GPU; the step ran in fp32"
    if recipe.train.compile:
        found["compile"] = "torch.compile"
    if recipe.train.trackers:
        found["trackers"] = ", ".join(recipe.train.trackers)
    found["run"] = "held-out evaluation, checkpoints, the run folder, and whether the loss falls"
    return found
