"""A step on two processes beside what the cost model of docs/SCALING.md says of it.

`python -m tests.benchmarks.predicted_step --json` prints one JSON object; preset small with 4 blocks at 128 px, 8
experts in every second block, dropless, 4 examples of each stream on each of two processes, gloo, float32, a thread
each:

- `constants`: what the model is told of this machine, measured beside the steps: `flops_s` and `memory_gb_s` from
  forward, backward and update of a process that talks to nobody while the other does the same; alpha and beta of
  all-to-all and all-reduce as in `collectives`; `busier`, tokens of the busier process over the mean;
- `measured_s`, `predicted_s`: seconds of a whole step: `alone` (from which the constants come: no prediction), `dp2`
  (parallel.expert 1) and `ep2` (parallel.expert 2); `parts_s`: what the prediction is made of;
- `dp2_error`, `ep2_error`: prediction over measurement, less 1; `ep2_over_dp2` of both.

Seconds are the least of the repeats, as whatever else runs on the machine only adds; the cases take turns. Nothing is
taken to overlap: two processes that compute leave no core free.
"""

from dataclasses import dataclass
from functools import partial

from tests.analysis.estimate.support import recipe_of
from tests.benchmarks.collectives import Line, lines_of, seconds_of_calls
from tests.benchmarks.collectives import Size as Sizes
from tests.benchmarks.common import Figures, run, timings
from tests.benchmarks.processes import on_processes
from tests.benchmarks.sides import PROCESSES, build_side, busier, cpu_accelerator, together
from tests.benchmarks.workload import CODES, WORDS, gradients, make_batch, make_model, make_objective
from vlmoe_core.analysis.scaling.cost import Fabric, Link
from vlmoe_core.analysis.scaling.machine import Machine
from vlmoe_core.analysis.scaling.plan import PASSED, UPDATE, Layout, predict
from vlmoe_core.analysis.scaling.work import Work, work_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.step import Stepper

BOUNDS: dict[str, float] = {}
TEXT, CAPTION = 128, 64
"""Tokens of each text, and of each pair's."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    preset: str
    layers: int
    experts: int
    image_size: int
    """Pixels."""
    examples: int
    """Of each stream, on each process."""
    calls: Sizes
    """Of the collectives."""
    repeats: int


FULL = Size("small", 4, 8, 128, 4, Sizes((2,), (1, 16, 256, 1024, 4096, 25600), rounds=9, calls=20), repeats=15)
QUICK = Size("tiny", 2, 4, 64, 1, Sizes((2,), (1, 4096), rounds=2, calls=2), repeats=2)


@dataclass(frozen=True)
class Measured:
    """What a process measured."""

    calls: dict[str, list[float]]
    """Seconds of collectives."""
    times: dict[str, list[float]]
    """Seconds of each case in each repeat."""
    busier: float
    """Share of the tokens that the busier process computes."""


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring."""
    size = QUICK if quick else FULL
    found = on_processes(PROCESSES, measure_together, size)
    lines = lines_of(size.calls, PROCESSES, [one.calls for one in found])
    seconds = {name: min(times) for name, times in found[0].times.items()}
    seconds["alone"] = seconds["backward"] + seconds["update"]
    work = work_of(make_recipe(size))
    machine = machine_here(work, seconds, lines)
    predicted = {
        "alone": predict(work, 1, Layout(1, 1, "none"), machine),
        "dp2": predict(work, 1, Layout(PROCESSES, 1, "none"), machine),
        "ep2": predict(work, 1, Layout(PROCESSES, PROCESSES, "none"), machine, PROCESSES * found[0].busier),
    }
    return {
        **{f"{name}_error": step.seconds / seconds[name] - 1 for name, step in predicted.items() if name != "alone"},
        "ep2_over_dp2": seconds["ep2"] / seconds["dp2"],
        "ep2_over_dp2_predicted": predicted["ep2"].seconds / predicted["dp2"].seconds,
        "measured_s": {name: seconds[name] for name in predicted},
        "predicted_s": {name: step.seconds for name, step in predicted.items()},
        "parts_s": {name: step.parts for name, step in predicted.items()},
        "spread_s": {name: [min(times), max(times)] for name, times in found[0].times.items()},
        "constants": constants(machine, lines, PROCESSES * found[0].busier),
        "million_params": (work.dense + work.shared) / 1e6,
        "bounds": BOUNDS,
    }


def make_recipe(size: Size) -> Recipe:
    """The recipe whose micro-batch the processes compute."""
    model = make_config(size).model_dump(exclude={"preset"}, exclude_unset=True)
    lengths = {"text": TEXT, "pair": CAPTION}
    return recipe_of(model, micro=size.examples, num_micro=2, vocab_size=WORDS, codes=CODES, max_text=lengths)


def make_config(size: Size) -> ModelConfig:
    """The model."""
    return make_model(size.preset, size.experts, layers=size.layers, image_size=size.image_size)


def make_batches(size: Size, config: ModelConfig, first: int) -> dict[StreamName, Batch]:
    """A micro-batch whose texts are all of the greatest length, as the recipe's formulas take them to be."""
    count = size.examples
    return {
        "image": make_batch("image", config, count, first=first),
        "text": make_batch("text", config, count, [TEXT] * count, first=first),
        "pair": make_batch("pair", config, count, [CAPTION] * count, first=first),
    }


def measure_together(size: Size) -> Measured:
    """For a child: the collectives, then a step alone and both ways together."""
    accelerator, config = cpu_accelerator(), make_config(size)
    batches = make_batches(size, config, size.examples * accelerator.process_index)
    objective = make_objective(config)
    sides = {name: build_side(accelerator, config, expert) for name, expert in (("dp2", 1), ("ep2", PROCESSES))}
    share = busier(sides["ep2"].objective, batches)
    micro = MicroBatch(accelerator.process_index, batches, ())
    cases = {
        "backward": together(partial(gradients, objective, batches)),
        **{name: together(partial(side.stepper, 0, [micro])) for name, side in sides.items()},
        "update": together(partial(update, sides["dp2"].stepper)),
    }
    return Measured(seconds_of_calls(size.calls), timings(cases, size.repeats), share)


def update(stepper: Stepper) -> None:
    """Clip the gradients that a step left, and update once more."""
    stepper.gradients.clip(1.0)
    stepper.optimizer.step()


def machine_here(work: Work, seconds: dict[str, float], lines: dict[str, Line]) -> Machine:
    """The machine on which a step alone takes just as long as it did."""
    memory_rate = UPDATE * (work.dense + work.shared) / seconds["update"]
    passed = PASSED * work.layer * sum(one.layers for one in work.passes) / memory_rate
    sums, tokens = lines["all_reduce"], lines["all_to_all"]
    link = Link(message=tokens.alpha, hop=sums.alpha / 2, bandwidth=1 / max(sums.beta, tokens.beta))
    return Machine(
        rate=work.flops / (seconds["backward"] - passed),
        memory=float("inf"),
        memory_rate=memory_rate,
        fabric=Fabric(start=0.0, node=PROCESSES, inside=link, between=link),
        behind=0.0,
    )


def constants(machine: Machine, lines: dict[str, Line], busier: float) -> dict[str, float]:
    """What the model was told, for people."""
    return {
        "gflops_s": machine.rate / 1e9,
        "memory_gb_s": machine.memory_rate / 1e9,
        "all_to_all_alpha_us": 1e6 * lines["all_to_all"].alpha,
        "all_to_all_gb_s": 1e-9 / lines["all_to_all"].beta,
        "all_reduce_alpha_us": 1e6 * lines["all_reduce"].alpha,
        "all_reduce_gb_s": 1e-9 / lines["all_reduce"].beta,
        "busier": busier,
    }


if __name__ == "__main__":
    run(__doc__, measure)
