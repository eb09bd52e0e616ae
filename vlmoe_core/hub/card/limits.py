"""What the numbers of a card do not say, and what was done to the weights. A sentence is there only where it holds."""

from collections import Counter
from collections.abc import Iterator

from vlmoe_core.data.config import STREAMS
from vlmoe_core.data.naming import SCENES, public_name, public_names
from vlmoe_core.hub.card.facts import model_name
from vlmoe_core.hub.card.folder import CardFolder


def limits(folder: CardFolder) -> list[str]:
    """The sentences."""
    return [
        said
        for part in (_of_data, _of_results, _of_aim, _of_capacity, _of_experts, _of_import, _of_upcycling, _of_export)
        for said in part(folder)
    ]


def _of_data(folder: CardFolder) -> Iterator[str]:
    if folder.run is None:
        return
    train = folder.run.data.train
    if all(public_name(source) == SCENES for stream in STREAMS for source in getattr(train, stream)):
        yield (
            "The training data of this run are drawings of simple shapes with texts made by rules, no photographs and "
            "no free language."
        )
    learned = set(public_names(train).split(", "))
    known = [r for r in folder.results if r.split != "train" and set(r.data.split(", ")) <= learned]
    if known:
        yield "Results are on data of the source that was trained on; they don't say how the model does on others."
    if any(r.split == "train" for r in folder.results):
        yield "A result on the split train is one on examples that the model has learnt from."


def _of_results(folder: CardFolder) -> Iterator[str]:
    if any(r.intervals for r in folder.results):
        yield (
            "Intervals are 95 % bootstrap intervals over the examples of one trained model: another seed would give "
            "another model."
        )


def _of_aim(folder: CardFolder) -> Iterator[str]:
    if folder.is_tokenizer:
        grid = folder.recipe.model.grid
        yield f"It gives codes to a grid of {grid} x {grid} patches; a model with another grid needs another tokenizer."
        return
    if folder.task is None:
        yield "Not finetuned: it has no head that answers a task."
    if folder.run is None or folder.task is not None:
        return
    left_out = [stream for stream in STREAMS if not folder.run.batch.size.of(stream)]
    if left_out:
        yield f"This run had no examples of: {', '.join(left_out)}."


def _of_capacity(folder: CardFolder) -> Iterator[str]:
    limited = {pool: moe.eval_capacity_factor for pool, moe in folder.recipe.model.pools.items()}
    shown = [f"{pool} {factor:g}" for pool, factor in limited.items() if factor is not None]
    if shown:
        yield (
            f"Experts have a capacity in evaluation too ({', '.join(shown)}): a token that finds no place passes no "
            "expert, and an answer can depend on the batch that it is in."
        )
    dropped = _router_figures(folder, "train", "dropped")
    if dropped and max(dropped.values()) > 0:
        name, share = max(dropped.items(), key=lambda one: one[1])
        yield f"At the last logged step of training {100 * share:.1f} % of the choices in {name} found no place."


def _of_experts(folder: CardFolder) -> Iterator[str]:
    dead = {name: int(count) for name, count in _router_figures(folder, "eval", "dead").items() if count}
    if dead:
        shown = ", ".join(f"{count} in {name}" for name, count in dead.items())
        yield f"Experts that no token of the last held-out evaluation chose: {shown}."


def _router_figures(folder: CardFolder, split: str, figure: str) -> dict[str, float]:
    """One figure of the last line of a split, by layer in words."""
    lines = [line for line in folder.metrics if line["split"] == split]
    found = {}
    for key, value in lines[-1].items() if lines else ():
        parts = key.split("/")
        if len(parts) == 4 and parts[0] == "router" and parts[3] == figure:
            found[f"{parts[1]} block {parts[2]}"] = value
    return found


def _of_import(folder: CardFolder) -> Iterator[str]:
    receipt = folder.imported
    if receipt is None:
        return
    yield f"Imported from {model_name(receipt.source)} ({receipt.family}); vlmoe did not train it."
    new = Counter(said.removeprefix("new: ") for said in receipt.tensors.values() if said.startswith("new: "))
    for reason, count in new.items():
        yield f"{count} tensors are not from there but as initialised: {reason}."
    yield from (f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in receipt.notes)


def _of_upcycling(folder: CardFolder) -> Iterator[str]:
    receipt = folder.upcycled
    if receipt is None:
        return
    yield (
        f"Upcycled from a dense model (step {receipt.step:,}): each of its networks became {receipt.experts} experts "
        f"behind a router that was drawn anew. On {sum(receipt.examples.values()):,} examples the final states moved "
        f"by at most {receipt.difference.states:.2g}."
    )
    if folder.step == receipt.step:
        yield "Not trained since: the experts of a layer still come from one and the same network."


def _of_export(folder: CardFolder) -> Iterator[str]:
    receipt = folder.exported
    if receipt is None:
        return
    if receipt.quantised is not None:
        share = receipt.quantised.values_quantised / max(1, receipt.quantised.values_total)
        yield f"Quantised: {100 * share:.1f} % of the values are int8, with a scale for each expert and output channel."
    if receipt.options.get("dtype"):
        yield f"The weights were rounded to {receipt.options['dtype']}."
    before, after = receipt.before.parameters, receipt.after.parameters
    if after < before:
        yield f"Parts of the model were left out in this export: {after:,} of {before:,} parameters are here."
