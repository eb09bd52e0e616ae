"""Routing statistics of a run's own evaluations, for its metrics and trackers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from vlmoe_core.analysis.routing.measures import gini
from vlmoe_core.analysis.routing.request import tasks_of
from vlmoe_core.analysis.routing.summarise import counted, merge
from vlmoe_core.analysis.routing.tables import Tables
from vlmoe_core.analysis.routing.trace import Trace, encoder_of, listening
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.parallel import gather_objects


@contextmanager
def watch_routing(objective: nn.Module, recipe: Recipe) -> Iterator[Callable[[], Mapping[str, float]]]:
    """Count the routing of all forward passes inside the `with` block.

    Yields what gives the figures, over all processes, which must all call it:
    `routing/<task>/<layer>/<modality>/{dropped,entropy,confidence,gini}`; entropy in nats, the others from 0 to 1.
    """
    found = Trace(encoder_of(objective).config, vocab_size=0, tasks=tasks_of(recipe))
    with listening(objective, found.receive):
        yield lambda: _figures(found)


def _figures(found: Trace) -> dict[str, float]:
    tables, _, _ = merge(gather_objects(counted(found)))
    return {
        f"routing/{cell.task.replace(' ', '_')}/{cell.layer}/{cell.modality}/{name}": value
        for cell, own in sorted(tables.items())
        for name, value in _of_cell(own).items()
    }


def _of_cell(tables: Tables) -> dict[str, float]:
    wanted_E = tables.wanted_KE.sum(0)
    return {
        "dropped": 1 - float(tables.got_KE.sum() / wanted_E.sum()),
        "entropy": float(tables.moments[0]) / tables.num_tokens,
        "confidence": float(tables.moments[2]) / tables.num_tokens,
        "gini": gini(wanted_E.numpy()),
    }
