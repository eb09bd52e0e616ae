"""Upcycling: a dense model becomes a sparse one that computes the same (arXiv 2212.05055)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from vlmoe_core.checkpoint.layout import RECIPE, name_of
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.checkpoint.manifest import dump_json
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.checkpoint.restore import load_model_state
from vlmoe_core.checkpoint.write import refuse_filled, write_model
from vlmoe_core.hf import is_hub
from vlmoe_core.hub.opened import EncoderAlone, build_model
from vlmoe_core.hub.upcycling.receipt import Comparison, Receipt, parameters_of
from vlmoe_core.hub.upcycling.recipe import Asked, notes_on, sparse_recipe
from vlmoe_core.hub.upcycling.samples import Samples, samples_of
from vlmoe_core.hub.upcycling.weights import sites_of, upcycled_moments, upcycled_tensors
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.load import dump_recipe, load_model_recipe
from vlmoe_core.tokenizers.text import load_text_tokenizer
from vlmoe_core.train.fitting import Tokenizers, read_tokenizers
from vlmoe_core.train.visual import refuse_tokenizer

RECEIPT = "upcycle.json"
ENCODER = "encoder."


@dataclass(frozen=True)
class _Model:
    """A model in evaluation mode, and what it is read with."""

    recipe: ModelRecipe
    tokenizers: Tokenizers | None
    module: nn.Module


def upcycle(source: Path, asked: Asked, out: Path, tell: Callable[[str], None] = lambda line: None) -> Receipt:
    """Make a sparse model of a dense one, compare the two on examples, and write the model folder.

    Args:
        source: a run, checkpoint or model folder, or hf-hub:ORG/NAME[@REVISION].
        asked: what it shall be.
        out: the model folder, new or empty. The receipt lies in it as upcycle.json.
        tell: takes a line about what went wrong on this machine, which the receipt, made to be published, leaves out.

    Raises:
        UsageError: the model is a visual tokenizer, is sparse there already, does not take what is asked for, or `out`
            holds files.
        CheckpointError, TokenizerError: the source is damaged, or the folder can't be written.
        HubError: the Hub does not give the source.
    """
    refuse_filled(out)
    checkpoint = read_checkpoint(resolve(source))
    recipe = load_model_recipe(checkpoint.path / RECIPE)
    refuse_tokenizer(recipe, str(source))
    sparse_as = sparse_recipe(recipe, asked)
    tokenizers = _tokenizers(recipe, checkpoint)
    dense = _Model(recipe, tokenizers, build_model(recipe, tokenizers))
    load_model_state(dense.module, _of_module(checkpoint, dense.module))
    sparse = _Model(sparse_as, tokenizers, build_model(sparse_as, tokenizers))
    sites = sites_of(sparse_as.model, asked.modalities)
    load_model_state(sparse.module, upcycled_tensors(dense.module.state_dict(), sites, asked.ways))
    moments = _moments(checkpoint, sparse, asked)
    samples = samples_of(recipe, tokenizers)
    if samples.trouble is not None:
        tell(f"compared on drawn scenes, for the held-out examples can't be read: {samples.trouble}")
    receipt = _compare(source, checkpoint, dense, sparse, asked, samples, moments is not None)
    _write(out, checkpoint, dense, sparse, moments, receipt)
    return receipt


def _tokenizers(recipe: ModelRecipe, checkpoint: Checkpoint) -> Tokenizers | None:
    """Those of a run; of an imported encoder the text tokenizer, null where it came without."""
    if isinstance(recipe, Recipe):
        return read_tokenizers(recipe, checkpoint.tokenizers)
    text = checkpoint.tokenizers / "text"
    return Tokenizers(load_text_tokenizer(str(text)), None) if text.is_dir() else None


def _of_module(checkpoint: Checkpoint, module: nn.Module) -> Mapping[str, Tensor]:
    """The tensors that a module must have; heads that came along with an imported encoder are none of its own."""
    if not isinstance(module, EncoderAlone):
        return checkpoint.model
    return {name: checkpoint.model[name] for name in checkpoint.model if name.startswith(ENCODER)}


def _moments(checkpoint: Checkpoint, sparse: _Model, asked: Asked) -> dict[str, Tensor] | None:
    """The optimiser's state of what the sparse model trains; null where the source has none."""
    if checkpoint.optimizer is None:
        return None
    sites = sites_of(sparse.recipe.model, asked.modalities)
    made = upcycled_moments(checkpoint.optimizer, sites, sparse.module.state_dict(), asked.ways)
    trained = {name for name, parameter in sparse.module.named_parameters() if parameter.requires_grad}
    return {key: tensor for key, tensor in made.items() if key.partition(".")[2] in trained}


def _compare(
    source: Path,
    checkpoint: Checkpoint,
    dense: _Model,
    sparse: _Model,
    asked: Asked,
    samples: Samples,
    moments: bool,
) -> Receipt:
    """Run both models over the samples."""
    model, rows = sparse.recipe.model, dense.recipe.tokenizers.text.vocab_size
    comparison = Comparison(model, {pool: model.pools[pool] for pool in asked.modalities})
    comparison.run(dense.module, sparse.module, samples)
    return Receipt(
        source=str(source) if is_hub(str(source)) else name_of(checkpoint.path),
        step=checkpoint.state.step,
        experts=asked.ways.experts,
        top_k=asked.top_k,
        weights=asked.weights or asked.keeping_weights,
        capacity_factor=asked.capacity_factor,
        noise=asked.ways.noise,
        drop=asked.ways.drop,
        router_std=asked.ways.router_std,
        seed=asked.ways.seed,
        layers={pool: model.sparse_layers(pool) for pool in asked.modalities},
        samples=samples.told,
        examples=samples.examples,
        difference=comparison.difference,
        loads=comparison.loads,
        dropped=comparison.dropped,
        before=parameters_of(dense.module, dense.recipe.model, rows),
        after=parameters_of(sparse.module, model, rows),
        moments=moments,
        notes=notes_on(asked, model),
    )


def _write(
    out: Path,
    checkpoint: Checkpoint,
    dense: _Model,
    sparse: _Model,
    moments: Mapping[str, Tensor] | None,
    receipt: Receipt,
) -> None:
    """The model folder. Best score and metrics were those of the dense run; heads without a module go along."""
    known = dense.module.state_dict()
    heads = {name: checkpoint.model[name] for name in checkpoint.model if name not in known}
    state = replace(checkpoint.state, best_score=None, best_step=None, metrics_offset=0, tracker_run="")
    tokenizers = checkpoint.tokenizers if checkpoint.tokenizers.is_dir() else _no_tokenizers
    tensors = {**sparse.module.state_dict(), **heads}

    def add_receipt(folder: Path) -> None:
        (folder / RECEIPT).write_text(dump_json(receipt.as_json()), encoding="utf-8")

    write_model(out, tensors, state, dump_recipe(sparse.recipe), tokenizers, moments, more=add_receipt)


def _no_tokenizers(folder: Path) -> None:
    """An encoder that came without."""
