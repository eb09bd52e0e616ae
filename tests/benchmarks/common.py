"""What the benchmarks share: repeats that take turns, medians, and printing."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median


def seconds(cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each case. The cases take turns, so that a machine that slows down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in times.items()}


def report(result: Mapping[str, object]) -> None:
    """Print the numbers: one JSON object with --json, a line each without."""
    if "--json" in sys.argv[1:]:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
