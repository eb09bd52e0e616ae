"""Results as the Hub shows them: `.eval_results/*.yaml`, and the model-index of older readers in the card.

What is stored of a run becomes an entry for each metric. Data that are no data set of the Hub keep their own name, with
a space in it, which is nobody's: the Hub lists such entries under no benchmark.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import yaml

from vlmoe_core.data.naming import is_hub_data
from vlmoe_core.hub.card.text import one_line
from vlmoe_core.train.results import StoredResult

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

FOLDER = ".eval_results"
PIPELINES = {
    "vqa": "visual-question-answering",
    "classification": "image-classification",
    "nli": "text-classification",
}
"""What the Hub calls a task; it has no word for the others."""
LONGEST = 80
"""Characters of a file's name."""


def current_results(results: Iterable[StoredResult], step: int | None) -> list[StoredResult]:
    """Those that were measured at this step; of several on the same split of the same data the most examples."""
    found: dict[tuple[str, str, str], StoredResult] = {}
    for one in sorted((r for r in results if r.step == step), key=lambda r: (r.limit is None, r.n, r.created)):
        found[one.task, one.data, one.split] = one
    return [found[key] for key in sorted(found)]


def eval_results_files(results: Iterable[StoredResult], step: int) -> dict[str, str]:
    """The files of `.eval_results/`, path -> YAML, of the results that were measured at this step."""
    return {
        f"{FOLDER}/{_slug(f'{one.data} {one.task} {one.split}')}.yaml": yaml.safe_dump(
            [_entry(one, metric) for metric in main_metrics(one)], sort_keys=False, allow_unicode=True, width=120
        )
        for one in current_results(results, step)
    }


def model_index(results: Sequence[StoredResult]) -> "list[EvalResult]":
    """The entries of `model-index`."""
    return [_legacy(one, metric) for one in results for metric in main_metrics(one)]


def main_metrics(result: StoredResult) -> list[str]:
    """The metrics and their parts (`accuracy/number`); not those by kind of question or of the first of two stages."""
    return [name for name in result.metrics if name.partition("/")[0] in result.metrics]


def other_metrics(result: StoredResult) -> list[str]:
    """The others."""
    main = set(main_metrics(result))
    return [name for name in result.metrics if name not in main]


def examples_of(result: StoredResult) -> str:
    """What was scored, in words."""
    read = f"{result.n:,} examples" if result.limit is None else f"the first {result.n:,} examples"
    left_out = f" ({result.broken:,} broken left out)" if result.broken else ""
    return f"{read} of {result.split}{left_out}"


def _entry(result: StoredResult, metric: str) -> dict[str, Any]:
    """One entry of a file, as huggingface_hub 2.x writes its EvalResultEntry; 1.x may not have that class."""
    return {
        "dataset": {"id": one_line(result.data), "task_id": _slug(f"{result.task} {metric}")},
        "value": round(result.metrics[metric], 2),
        "date": datetime.fromtimestamp(result.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "notes": "; ".join(_notes(result, metric)),
    }


def _notes(result: StoredResult, metric: str) -> Iterator[str]:
    interval = f", 95 % interval {_range(result.intervals[metric])}" if metric in result.intervals else ""
    yield f"{one_line(metric)} in percent{interval}"
    yield examples_of(result)
    for name, found in result.baselines.items():
        if metric in found:
            yield f"{one_line(name)} baseline {found[metric]:.2f}"
    yield f"vlmoe eval {result.task}, step {result.step}"


def _legacy(result: StoredResult, metric: str) -> "EvalResult":
    from huggingface_hub import EvalResult

    interval = f" (percent, 95 % interval {_range(result.intervals[metric])})" if metric in result.intervals else ""
    return EvalResult(
        task_type=PIPELINES.get(result.task, result.task),
        task_name=result.task,
        dataset_type=result.data if is_hub_data(result.data) else _slug(result.data),
        dataset_name=one_line(result.data),
        dataset_split=result.split,
        metric_type=one_line(metric),
        metric_name=f"{one_line(metric)}{interval or ' (percent)'}",
        metric_value=round(result.metrics[metric], 2),
    )


def _range(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{low:.2f} to {high:.2f}"


def _slug(text: str) -> str:
    """Lower-case letters, digits and hyphens; a long one ends with a digest of the whole."""
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if found and len(found) <= LONGEST:
        return found
    return f"{found[: LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".strip("-")
