"""What the benchmarks share: the command line, repeats that take turns, medians, and printing."""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch

Figures = Mapping[str, object]
Times = Mapping[str, Sequence[float]]


def timings(cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each case in each repeat. The cases take turns, so that a slow moment of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def medians(times: Times) -> dict[str, float]:
    """The median seconds of each case, as `<name>_s`."""
    return {f"{name}_s": median(taken) for name, taken in times.items()}


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the repeats' own ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(doc: str | None, measure: Callable[[bool], Figures], argv: Sequence[str] | None = None) -> None:
    """Measure and print, as the command line says."""
    options = arguments(doc).parse_args(argv)
    show(measure(options.quick), options.json)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The command line of every benchmark; --quick: small, in seconds, for tests."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small workload that shows no more than that it runs")
    return parser


def show(figures: Figures, as_json: bool) -> None:
    """One JSON object, or a line for each figure."""
    rounded = {name: _rounded(value) for name, value in figures.items()}
    if as_json:
        print(json.dumps(rounded))
        return
    for name, value in rounded.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def _rounded(value: object) -> object:
    """Floats with 4 decimals, those inside lists and mappings too."""
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value
