"""Experts on two processes: what they save, what travels, what a checkpoint costs, and what one process pays for it.

`python -m tests.benchmarks.expert_parallel --json` prints one JSON object, float32, two processes with gloo on one CPU
and a thread each unless said; the cases of a figure take turns in one run. `bounds`: what must not be exceeded.

- `ep2_over_dp2`: seconds of a whole step (three streams, loss, backward, clipping, AdamW) with `parallel.expert: 2`
  over those of plain data parallelism, the same examples; preset small with 4 blocks, 16 experts in every second one,
  dropless. `busier`: mean share of a layer's choices that the busier process computes (0.5: balanced);
- `wire_overhead`: bytes that forward and backward hand to the other process, counts included, over the least possible:
  each kept choice of an expert that is elsewhere crosses four times. `wire_overhead_top2`: two experts a token;
  `wire_over_merged_top2`: over a minimum that sends a token once to a process that holds both of them;
- `save_over_plain`: seconds until a checkpoint of the expert-parallel model and its moments is whole, over `save_file`,
  fsync and `sha256sum` of the same tensors by one process; `save_over_halves`: over the same, half by each process and
  hashed by Python's library as ours are, which may be quicker than `sha256sum`;
- `stall_share`: what an asynchronous save costs the loop, over the time between two saves at one in 100 steps: the call
  that begins it (alone: `begin_share`) and all by which the steps until it is whole are slower;
- `beside_over_after`: forward and backward of a sparse layer with a shared expert that is computed while the tokens
  travel, over the same computed after they are back;
- `alone_over_before`: a step of ours on one process, on the GPU if there is one, over the same step by hand: forward,
  backward, clipping, AdamW and no more. Bounded on a GPU alone.

`spread`: smallest and largest of the repeats' own figures; `seconds`: medians.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.common import Figures, Times, medians, run, threads, timings
from tests.benchmarks.processes import on_processes
from tests.benchmarks.saves import Stall, time_saves, time_stall
from tests.benchmarks.sides import OPTIM, PROCESSES, build_side, busier, cpu_accelerator, process_TK, together
from tests.benchmarks.workload import make_model, make_objective, three_streams
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.exchange import Exchange
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.plan import RoutingPlan
from vlmoe_core.moe.share import Share
from vlmoe_core.objectives.kinds.masked import MaskedModelling
from vlmoe_core.train.optim import build_optimizer

BOUNDS = {
    "wire_overhead": 1.1,
    "save_over_plain": 1.25,
    "stall_share": 0.05,
    **({"alone_over_before": 1.02} if torch.cuda.is_available() else {}),
}
RATIOS = {
    "ep2_over_dp2": ("ep2", "dp2"),
    "save_over_plain": ("save", "plain"),
    "save_over_halves": ("save", "halves"),
    "beside_over_after": ("beside", "after"),
    "alone_over_before": ("alone", "before"),
}
"""Figures that compare two cases."""
TRANSFERS = 4
"""Tokens there, outputs back, gradients there, gradients back."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    preset: str
    layers: int
    experts: int
    """E of each sparse layer."""
    examples: int
    """Of each stream, on each process."""
    wire_examples: int
    """The same where bytes are counted."""
    layer: tuple[int, int, int]
    """Width, hidden width and tokens of each process of the layer with a shared expert."""
    repeats: int
    layer_repeats: int
    threads: int
    """Where there is one process."""


FULL = Size("small", 4, 16, 8, wire_examples=2, layer=(384, 1536, 4096), repeats=5, layer_repeats=15, threads=2)
QUICK = Size("tiny", 2, 4, 1, wire_examples=1, layer=(32, 64, 64), repeats=1, layer_repeats=1, threads=1)


@dataclass(frozen=True)
class Found:
    """What one of the processes found."""

    times: Times
    """Seconds of each case in each repeat; the same on all, as a case ends when all have ended it."""
    busier: float
    stalls: Sequence[Stall]
    bytes: Mapping[int, "Bytes"]
    """By the number of experts that a token goes to."""


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring."""
    size = QUICK if quick else FULL
    found = on_processes(PROCESSES, measure_together, size)
    with threads(size.threads):
        times = {**found[0].times, **time_alone(size)}
    figures = {name: _ratios(times[above], times[below]) for name, (above, below) in RATIOS.items()}
    figures["stall_share"] = [stall.share(stall.lost) for stall in found[0].stalls]
    figures["begin_share"] = [stall.share(stall.begin) for stall in found[0].stalls]
    return {
        **{name: median(values) for name, values in figures.items()},
        "busier": found[0].busier,
        **_wire([one.bytes for one in found]),
        "spread": {name: [min(values), max(values)] for name, values in figures.items()},
        "seconds": medians(times),
        "bounds": BOUNDS,
    }


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def measure_together(size: Size) -> Found:
    """For a child: all that takes several processes."""
    accelerator = cpu_accelerator()
    steps, share, stalls = time_steps(size, accelerator)
    gc.collect()
    return Found({**steps, **time_layers(size, accelerator)}, share, stalls, count_bytes(size, accelerator))


def time_steps(size: Size, accelerator: Accelerator) -> tuple[Times, float, list[Stall]]:
    """Seconds of steps and saves, the share of the busier process, and what saves cost the steps."""
    config, micro = make_config(size), accelerator.process_index
    batches = three_streams(config, size.examples, first=size.examples * micro)
    sides = {name: build_side(accelerator, config, expert) for name, expert in (("dp2", 1), ("ep2", PROCESSES))}
    drawn = MicroBatch(micro, batches, ())
    cases = {name: together(partial(side.stepper, 0, [drawn])) for name, side in sides.items()}
    steps = timings(cases, size.repeats)
    saves = time_saves(sides["ep2"], sides["dp2"], size.repeats)
    return {**steps, **saves}, busier(sides["ep2"].objective, batches), time_stall(sides["ep2"], drawn, size.repeats)


def make_config(size: Size, top_k: int = 1) -> ModelConfig:
    """The model, of which each token uses `top_k` experts."""
    config = make_model(size.preset, size.experts, layers=size.layers)
    pools = {name: moe.model_copy(update={"top_k": top_k}) for name, moe in config.pools.items()}
    return config.model_copy(update={"moe": config.moe.model_copy(update=pools)})


# Bytes on the wire


@dataclass(frozen=True)
class Bytes:
    """What one process sends to others in forward and backward."""

    sent: int
    least: int
    """A row for each kept choice of an expert that is elsewhere."""
    merged: int
    """A row for each process elsewhere that holds experts of a token, however many."""


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this process hands to all-to-alls for the others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.bytes = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            rows, _, sent, _ = args
            elsewhere = sum(sent) - sent[self.rank] if sent else len(rows) - len(rows) // PROCESSES
            self.bytes += elsewhere * rows[:1].nbytes
        return func(*args, **(kwargs or {}))


def count_bytes(size: Size, accelerator: Accelerator) -> dict[int, Bytes]:
    """The bytes of this process, by the number of experts that a token goes to."""
    found, rank = {}, accelerator.process_index
    for top_k in (1, 2):
        config = make_config(size, top_k)
        objective = build_side(accelerator, config, PROCESSES).objective
        batches = three_streams(config, size.wire_examples, first=size.wire_examples * rank)
        found[top_k] = _bytes(objective, batches, rank)
    return found


def _bytes(objective: MaskedModelling, batches: Mapping[StreamName, Batch], rank: int) -> Bytes:
    with Traffic(rank) as traffic:
        loss = objective(batches)
        loss.total(objective.counts(batches)).backward()
    plans = [one.plan for _, one in loss.routed]
    crossing = TRANSFERS * objective.encoder.config.dim * torch.float32.itemsize
    least = sum(int(((process_TK(plan) != rank) & plan.kept_TK).sum()) for plan in plans)
    merged = sum(_processes_elsewhere(plan, rank) for plan in plans)
    return Bytes(traffic.bytes, crossing * least, crossing * merged)


def _processes_elsewhere(plan: RoutingPlan, rank: int) -> int:
    """Pairs of a token and another process that holds experts to which it goes."""
    place_TK = process_TK(plan).masked_fill(~plan.kept_TK, rank)
    goes_TP = torch.zeros(len(place_TK), PROCESSES, dtype=torch.bool).scatter_(1, place_TK, True)
    goes_TP[:, rank] = False
    return int(goes_TP.sum())


def _wire(found: Sequence[Mapping[int, Bytes]]) -> Figures:
    def total(name: str, top_k: int) -> int:
        return sum(getattr(one[top_k], name) for one in found)

    return {
        "wire_overhead": total("sent", 1) / total("least", 1),
        "wire_overhead_top2": total("sent", 2) / total("least", 2),
        "wire_over_merged_top2": total("sent", 2) / total("merged", 2),
        "wire_mib": total("sent", 1) / 2**20,
    }


# A shared expert while tokens travel


def time_layers(size: Size, accelerator: Accelerator) -> Times:
    """Seconds of a layer with the shared expert computed beside the exchange and after it."""
    dim, _, tokens = size.layer
    layer = _shared_expert_layer(size, accelerator.process_index)
    drawn = torch.Generator().manual_seed(accelerator.process_index)
    x_TD, grad_TD = torch.randn(2, tokens, dim, generator=drawn)
    forwards = {"beside": _beside, "after": _after}
    cases = {name: together(partial(_pass, layer, forward, x_TD, grad_TD)) for name, forward in forwards.items()}
    return timings(cases, size.layer_repeats, warmup=2)


def _shared_expert_layer(size: Size, rank: int) -> SparseFFN:
    dim, hidden, _ = size.layer
    moe = {"num_experts": size.experts, "capacity_factor": None, "shared_expert": True}
    torch.manual_seed(0)
    layer = SparseFFN(dim, hidden, MoEConfig.model_validate(moe), init_std=0.02)
    share = size.experts // PROCESSES
    assert dist.group.WORLD is not None
    layer.experts.keep(Share(rank * share, share, size.experts), Exchange(dist.group.WORLD))
    return layer


def _beside(layer: SparseFFN, x_TD: Tensor) -> Tensor:
    return layer(x_TD)[0]


def _after(layer: SparseFFN, x_TD: Tensor) -> Tensor:
    assert layer.shared_expert is not None
    y_TD: Tensor = layer.experts(x_TD, layer.router(x_TD, None, None))
    return y_TD + layer.shared_expert(x_TD)


def _pass(layer: SparseFFN, forward: Callable[[SparseFFN, Tensor], Tensor], x_TD: Tensor, grad_TD: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    forward(layer, x_TD.clone().requires_grad_()).backward(grad_TD)


# One process


def time_alone(size: Size) -> Times:
    """Seconds of a step of ours and of one by hand, on one process."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    config = make_config(size)
    ours = build_side(accelerator, config, expert=1).stepper
    batches = {name: batch.to(accelerator.device) for name, batch in three_streams(config, size.examples).items()}
    by_hand = ByHand(make_objective(config).to(accelerator.device))
    cases = {"alone": partial(ours, 0, [MicroBatch(0, batches, ())]), "before": partial(by_hand, batches)}
    return timings({name: _finished(case) for name, case in cases.items()}, size.repeats)


class ByHand:
    """A step without mesh, accelerator and reports."""

    def __init__(self, objective: MaskedModelling) -> None:
        self.objective = objective.train()
        self.optimizer = build_optimizer(objective, OPTIM, objective.encoder.config.layers)

    def __call__(self, batches: Mapping[StreamName, Batch]) -> None:
        """One step on one micro-batch."""
        torch.manual_seed(0)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective(batches).total(self.objective.counts(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), OPTIM.clip_norm)
        self.optimizer.step()


def _finished(case: Callable[[], object]) -> Callable[[], None]:
    """A case that ends when the GPU has ended it."""

    def wait() -> None:
        case()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return wait


if __name__ == "__main__":
    run(__doc__, measure)
