"""Routing statistics of a run's own evaluations, for its metrics and trackers."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean

from torch import nn

from vlmoe_core.analysis.routing.measures import gini
from vlmoe_core.analysis.routing.request import tasks_of
from vlmoe_core.analysis.routing.summarise import counted, merge
from vlmoe_core.analysis.routing.tables import Tables
from vlmoe_core.analysis.routing.trace import Trace, encoders_of, listening
from vlmoe_core.data.batch import Batch
from vlmoe_core.model.encoder import Encoded
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.parallel import gather_objects


@contextmanager
def watch_routing(objective: nn.Module, recipe: Recipe) -> Iterator[Callable[[], Mapping[str, float]]]:
    """Count the routing of all forward passes inside the `with` block.

    Yields what gives the figures, over all processes, which must all call it: means over the sparse layers, as
    `routing/<task>/<modality>/{dropped,entropy,confidence,gini}`; entropy in nats, the others from 0 to 1. Views for
    image-text contrast, in which nothing is hidden, are left out. An objective with several encoders that learn
    has no figures.
    """
    encoders = encoders_of(objective)
    if len(encoders) != 1:
        yield dict
        return
    found = Trace(encoders[0].config, vocab_size=0, tasks=tasks_of(recipe))

    def receive(batch: Batch, encoded: Encoded) -> None:
        if recipe.task is not None or batch.num_masked_patches or batch.num_masked_words:
            found.receive(batch, encoded)

    with listening(objective, receive):
        yield lambda: _figures(found)


def _figures(found: Trace) -> dict[str, float]:
    tables, _, _ = merge(gather_objects(counted(found)))
    layers: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell, own in sorted(tables.items()):
        layers[f"routing/{cell.task.replace(' ', '_')}/{cell.modality}"].append(_of_cell(own))
    return {f"{key}/{name}": fmean(one[name] for one in own) for key, own in layers.items() for name in own[0]}


def _of_cell(tables: Tables) -> dict[str, float]:
    wanted_E = tables.wanted_KE.sum(0)
    return {
        "dropped": 1 - float(tables.got_KE.sum() / wanted_E.sum()),
        "entropy": float(tables.moments[0]) / tables.num_tokens,
        "confidence": float(tables.moments[2]) / tables.num_tokens,
        "gini": gini(wanted_E.numpy()),
    }
