"""What the experts cost against the dense layer of equal FLOPs, and against Tutel's own layer.

`python -m tests.benchmarks.moe_layer --json` prints one JSON object, all on 2 threads of a CPU. `cases` holds one
object for each row of sizes (`--case N`: that row alone, from 0):

- `grouped_over_dense`, `grouped_over_tutel` (null where tutel is not installed), `tutel_over_dense`: seconds of forward
  and backward, router and biases included, as medians of the repeats' own ratios; all sides take turns in one run;
- `grouped_peak_over_dense`: most bytes alive of activations and temporaries, without parameters and their gradients;
- `busiest`: share of the choices that the busiest expert gets (1/E: balanced); `seconds`, `peak_mib`: of each side;
- `bounds`: what the figures of the same names must not exceed;
- `autocast`: the ratios once more with float32 masters under bfloat16 autocast, ours with held copies of the weights;
  beside rows of bfloat16 alone, and without a bound.

Weights are held in the dtype of the row on every side. Ours is dropless and without noise. Tutel's layer has capacity
factor 1.25, no batch-priority routing and its gate in float32, which starts from our router's weights; it also computes
the value of its balance loss, which can't be turned off and has no share in the backward pass.

`--curves` prints `curves` instead: `top_k` (1 to 4, 16 experts) and `num_experts` (8 to 128, top-1), seconds of each
side; `traffic` there is the time to read all weights of the experts twice and to write their gradients once.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.common import Figures, arguments, show, threads
from vlmoe_core.errors import UsageError
from vlmoe_core.moe.bench import (
    Case,
    Side,
    dense_layer,
    inputs,
    median_ratio,
    side_of,
    sparse_layer,
    take_turns,
)
from vlmoe_core.moe.health import router_health

PEAK_BOUND = 1.25
TUTEL_CAPACITY = 1.25


@dataclass(frozen=True)
class Row:
    """Sizes, and what must not be exceeded there."""

    case: Case
    over_dense: float
    over_tutel: float


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: tuple[Row, ...]
    curve: Case
    """The case that the curves change."""
    num_experts: tuple[int, ...]
    repeats: int
    threads: int


FULL = Size(
    rows=(
        Row(Case(768, 3072, 16, 4096, 1, "float32"), 1.08, 0.75),
        Row(Case(384, 1536, 16, 8192, 1, "float32"), 1.00, 0.73),
        Row(Case(384, 1536, 32, 8192, 2, "float32"), 1.07, 0.70),
        Row(Case(384, 1536, 16, 8192, 1, "bfloat16"), 1.20, 0.70),
        Row(Case(768, 3072, 32, 4096, 1, "bfloat16"), 1.35, 0.67),
    ),
    curve=Case(384, 1536, 16, 8192, 1, "float32"),
    num_experts=(8, 16, 32, 64, 128),
    repeats=9,
    threads=2,
)
QUICK = Size(
    rows=(
        Row(Case(32, 64, 8, 128, 2, "float32"), 1.0, 1.0),
        Row(Case(32, 64, 4, 128, 1, "bfloat16"), 1.0, 1.0),
    ),
    curve=Case(32, 64, 4, 128, 1, "float32"),
    num_experts=(4, 8),
    repeats=1,
    threads=1,
)


def measure(quick: bool = False, only: int | None = None) -> Figures:
    """The figures of the module's docstring; of row `only`, if it is given."""
    size = QUICK if quick else FULL
    if only is not None and not 0 <= only < len(size.rows):
        raise UsageError(f"no case {only}; there are 0 to {len(size.rows) - 1}")
    rows = size.rows if only is None else size.rows[only : only + 1]
    with threads(size.threads):
        return {"cases": [_figures(row, size.repeats) for row in rows]}


def curves(quick: bool = False) -> Figures:
    """How the cost grows with choices and with experts."""
    size = QUICK if quick else FULL
    by_choices = [replace(size.curve, top_k=k) for k in (1, 2, 3, 4)]
    by_experts = [replace(size.curve, num_experts=e) for e in size.num_experts]
    with threads(size.threads):
        return {
            "curves": {
                "top_k": [_point(case, size.repeats) for case in by_choices],
                "num_experts": [_point(case, size.repeats) for case in by_experts],
            }
        }


def tutel_available() -> bool:
    """Whether the tutel package is installed."""
    return importlib.util.find_spec("tutel") is not None


def _figures(row: Row, repeats: int) -> dict[str, Any]:
    sides = sides_of(row.case)
    busiest = _busiest(sides["grouped"])
    if row.case.dtype == "bfloat16":
        sides |= {f"{name}_autocast": side for name, side in sides_of(row.case, autocast=True).items()}
    times = take_turns(sides, repeats)
    peaks = {name: side.peak() for name, side in sides.items()}
    return {
        **_sizes(row.case),
        **_ratios(times, peaks),
        "busiest": busiest,
        "bounds": {
            "grouped_over_dense": row.over_dense,
            "grouped_over_tutel": row.over_tutel,
            "grouped_peak_over_dense": PEAK_BOUND,
        },
        "autocast": _ratios(times, peaks, "_autocast") if "dense_autocast" in sides else None,
        "seconds": {name: median(taken) for name, taken in times.items()},
        "peak_mib": {name: peak / 2**20 for name, peak in peaks.items()},
    }


def _point(case: Case, repeats: int) -> dict[str, Any]:
    """One point of a curve."""
    x_TD, grad_TD = inputs(case)
    sides = {**sides_of(case), "traffic": side_of(WeightTraffic(case), x_TD, grad_TD)}
    times = take_turns(sides, repeats)
    ratio = median_ratio(times["grouped"], times["dense"])
    return {**_sizes(case), "grouped_over_dense": ratio, "seconds": {n: median(taken) for n, taken in times.items()}}


def _sizes(case: Case) -> dict[str, Any]:
    return {name: value for name, value in asdict(case).items() if name != "device"}


def _ratios(times: dict[str, list[float]], peaks: dict[str, int], suffix: str = "") -> dict[str, float | None]:
    dense, grouped, tutel = (f"{name}{suffix}" for name in ("dense", "grouped", "tutel"))
    return {
        "grouped_over_dense": median_ratio(times[grouped], times[dense]),
        "grouped_over_tutel": median_ratio(times[grouped], times[tutel]) if tutel in times else None,
        "tutel_over_dense": median_ratio(times[tutel], times[dense]) if tutel in times else None,
        "grouped_peak_over_dense": peaks[grouped] / peaks[dense],
    }


def sides_of(case: Case, autocast: bool = False) -> dict[str, Side]:
    """The dense layer, ours, and where it is installed Tutel's; `autocast`: float32 masters under the case's dtype."""
    dtype = case.torch_dtype if autocast else None
    held = replace(case, dtype="float32") if autocast else case
    x_TD, grad_TD = inputs(held)
    grouped = sparse_layer(held, "grouped")
    grouped.experts.hold_copies(dtype)
    layers: dict[str, nn.Module] = {"dense": dense_layer(held), "grouped": grouped}
    if tutel_available():
        layers["tutel"] = tutel_layer(held, grouped.router.weight)
    return {name: side_of(layer, x_TD, grad_TD, dtype) for name, layer in layers.items()}


def tutel_layer(case: Case, router_ED: Tensor) -> nn.Module:
    """Tutel's own layer of a case, with the weights of our router."""
    from tutel.moe import moe_layer

    layer: nn.Module = moe_layer(
        gate_type={"type": "top", "k": case.top_k, "fp32_gate": True, "capacity_factor": TUTEL_CAPACITY},
        experts={
            "type": "ffn",
            "num_experts_per_device": case.num_experts,
            "hidden_size_per_expert": case.hidden,
            "activation_fn": F.gelu,
        },
        model_dim=case.dim,
        batch_prioritized_routing=False,
    ).to(case.torch_dtype)
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(router_ED)
    return layer


def _busiest(side: Side) -> float:
    with torch.no_grad():
        _, plan = side.layer(side.x_TD)
    return float(router_health(plan)["busiest"])


class WeightTraffic(nn.Module):
    """Reads the experts' weights in the forward and the backward pass and writes their gradients, no more."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = case.num_experts, case.hidden, case.dim
        self.weights = nn.ParameterList(torch.ones(sizes, dtype=case.torch_dtype) for _ in ("up", "down"))

    def forward(self, x_TD: Tensor) -> Tensor:
        for weight in self.weights:
            x_TD = _Traffic.apply(x_TD, weight)
        return x_TD


class _Traffic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        weight.sum()
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        weight.sum()
        return grad_TD, torch.ones_like(weight)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of the module's docstring."""
    parser = arguments(__doc__)
    parser.add_argument("--case", type=int, metavar="N", help="the row of this number alone, from 0")
    parser.add_argument("--curves", action="store_true", help="top_k and num_experts as curves, for docs/plot_moe.py")
    options = parser.parse_args(argv)
    work = curves if options.curves else partial(measure, only=options.case)
    show(work(options.quick), options.json)


if __name__ == "__main__":
    main()
