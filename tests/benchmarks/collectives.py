"""What a message and a byte between processes cost on this machine: alpha and beta of docs/SCALING.md.

`python -m tests.benchmarks.collectives --json` prints one JSON object; gloo, one thread a process, float32:

- `<collective>_<P>_alpha_us`: microseconds of a call that moves nothing, on P processes;
- `<collective>_<P>_gb_s`: 10^9 bytes a second that each process sends, once the calls are large;
- `<collective>_<P>_error`: mean distance of the line from what was measured, as a share of it;

for `all_to_all`, `all_reduce`, `reduce_scatter` and `all_gather` with P = 2 and 4. A process sends (P - 1) / P of its
tensor, twice as much in `all_reduce`. Both figures come from a line through the seconds of calls of 1 KiB to 64 MiB,
the least of several rounds, as a busy machine only adds; each size counts the same.

A collective of a machine's library may send more than the ring that the formulas speak of: then `gb_s` is what it is
worth, not what the wire bears.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from tests.benchmarks.common import Figures, run
from tests.benchmarks.processes import on_processes

BOUNDS: dict[str, float] = {}
SENT = {"all_to_all": 1, "all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""How often each process sends (P - 1) / P of its tensor."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    ranks: tuple[int, ...]
    kilobytes: tuple[int, ...]
    rounds: int
    calls: int
    """Calls of the smallest size in a round; the largest have one."""


FULL = Size((2, 4), (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536), rounds=7, calls=20)
QUICK = Size((2,), (1, 4096), rounds=2, calls=2)


@dataclass(frozen=True)
class Line:
    """Seconds of a call: alpha + bytes sent x beta."""

    alpha: float
    """Seconds."""
    beta: float
    """Seconds a byte."""
    error: float
    """Mean distance from what was measured, as a share of it."""


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring."""
    size = QUICK if quick else FULL
    figures: dict[str, object] = {}
    for ranks in size.ranks:
        for name, line in lines_of(size, ranks, on_processes(ranks, seconds_of_calls, size)).items():
            figures[f"{name}_{ranks}_alpha_us"] = 1e6 * line.alpha
            figures[f"{name}_{ranks}_gb_s"] = 1e-9 / line.beta
            figures[f"{name}_{ranks}_error"] = line.error
    return {**figures, "bounds": BOUNDS}


def lines_of(size: Size, ranks: int, measured: Sequence[dict[str, list[float]]]) -> dict[str, Line]:
    """The line of each collective, from what each process measured; the slowest counts."""
    lines = {}
    for name, factor in SENT.items():
        sent = [factor * (ranks - 1) / ranks * 1024 * kilobytes for kilobytes in size.kilobytes]
        lines[name] = fit(sent, [max(one[name][i] for one in measured) for i in range(len(sent))])
    return lines


def seconds_of_calls(size: Size) -> dict[str, list[float]]:
    """For a child: seconds of a call of each collective, for tensors of each size."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found: dict[str, list[float]] = {name: [] for name in SENT}
    with warnings.catch_warnings():
        # torch 2.13 renames two collectives; 2.11 does not know the new names.
        warnings.simplefilter("ignore", FutureWarning)
        for kilobytes in size.kilobytes:
            calls = max(1, size.calls * size.kilobytes[0] // kilobytes)
            for name, call in _calls(kilobytes * 256).items():
                found[name].append(min(_round(call, calls) for _ in range(size.rounds)))
    return found


def _calls(numbers: int) -> dict[str, Callable[[], object]]:
    """Each collective on a tensor of so many numbers, which the ranks divide."""
    whole, other, zeros = torch.ones(numbers), torch.empty(numbers), torch.zeros(numbers)
    part = torch.ones(numbers // dist.get_world_size())
    return {
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "all_reduce": lambda: dist.all_reduce(zeros),  # sums of sums of ones would overflow
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(other, part),
    }


def _round(call: Callable[[], object], calls: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def fit(sent: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line alpha + bytes x beta whose squared distances, as shares of the measured seconds, are least."""
    bytes_N, seconds_N = np.array(sent), np.array(seconds)
    sides_N2 = np.stack([np.ones_like(bytes_N), bytes_N], axis=1) / seconds_N[:, None]
    (alpha, beta), *_ = np.linalg.lstsq(sides_N2, np.ones_like(seconds_N), rcond=None)
    error = np.abs(alpha + beta * bytes_N - seconds_N) / seconds_N
    return Line(float(alpha), float(beta), float(error.mean()))


if __name__ == "__main__":
    run(__doc__, measure)
