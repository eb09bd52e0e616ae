"""What sparse layers cost in a pretraining step, and what packing saves.

`python -m tests.benchmarks.pretrain_step --json` prints one JSON object, all in float32 on 2 threads of a CPU:

- `sparse_over_dense`: seconds of a whole step (three streams, loss, backward, clipping, AdamW) of preset small with 16
  experts in every second block, over those of its dense twin on the same tokens;
- `sparse_over_dense_no_optimizer`: the same for forward and backward alone;
- `tokens`, `busiest`: tokens of a step, and the mean share of its group that the busiest expert gets (1/16: balanced);
  nothing is dropped;
- `packed_over_padded`: pair stream, forward and backward of the sparse model at 128 px, Flickr8k's captions as they
  are, over the same padded to 64 tokens; `packed_over_padded_dense`: of its dense twin; `token_ratio` beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator

from tests.benchmarks.common import Figures, median_ratio, medians, run, threads, timings
from tests.benchmarks.workload import caption_lengths, gradients, make_batch, make_model, make_objective, num_tokens
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.health import router_health
from vlmoe_core.objectives.kinds.masked import MaskedModelling
from vlmoe_core.train.config import OptimConfig
from vlmoe_core.train.mesh import ALONE
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.step import Stepper

BOUNDS = {"sparse_over_dense": 1.30, "sparse_over_dense_no_optimizer": 1.13, "packed_over_padded": 0.80}
PADDED = 64
STEPS = 10_000
LR = 1e-4


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    preset: str
    experts: int
    """E of the sparse model."""
    images: int
    """Images of the image stream."""
    texts: int
    """Texts of the text stream, 96 to 128 tokens each, as packed sentences are."""
    pairs: int
    """Pairs of the pair stream."""
    packed_pairs: int
    """Pairs of the comparison with padding."""
    repeats: int
    threads: int


FULL = Size("small", experts=16, images=32, texts=32, pairs=32, packed_pairs=32, repeats=3, threads=2)
QUICK = Size("tiny", experts=4, images=2, texts=2, pairs=2, packed_pairs=4, repeats=1, threads=1)


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring."""
    size = QUICK if quick else FULL
    with threads(size.threads):
        return {**_sparse_over_dense(size), **_packed_over_padded(size), "bounds": BOUNDS}


def _sparse_over_dense(size: Size) -> Figures:
    models = {"sparse": make_model(size.preset, size.experts), "dense": make_model(size.preset, None)}
    batches = _three_streams(size, models["dense"])
    objectives = {name: make_objective(config) for name, config in models.items()}
    steps = {f"{name}_step": _stepper(objective, batches) for name, objective in objectives.items()}
    backwards = {f"{name}_backward": partial(gradients, o, batches) for name, o in objectives.items()}
    times = timings({**steps, **backwards}, size.repeats)
    return {
        "sparse_over_dense": median_ratio(times["sparse_step"], times["dense_step"]),
        "sparse_over_dense_no_optimizer": median_ratio(times["sparse_backward"], times["dense_backward"]),
        "tokens": num_tokens(batches, models["dense"]),
        "busiest": _busiest(objectives["sparse"], batches),
        **medians(times),
    }


def _three_streams(size: Size, config: ModelConfig) -> dict[StreamName, Batch]:
    texts = [96 + 32 * i // max(1, size.texts - 1) for i in range(size.texts)]
    return {
        "image": make_batch("image", config, size.images),
        "text": make_batch("text", config, size.texts, texts),
        "pair": make_batch("pair", config, size.pairs, caption_lengths(size.pairs)),
    }


def _stepper(objective: MaskedModelling, batches: Mapping[StreamName, Batch]) -> partial[object]:
    """One step of training on one micro-batch."""
    config, accelerator = OptimConfig(lr=LR), Accelerator(cpu=True)
    stepper = Stepper(
        accelerator,
        objective,
        ALONE,
        accelerator.prepare(build_optimizer(objective, config, objective.encoder.config.layers)),
        config,
        STEPS,
        seed=0,
    )
    return partial(stepper, 0, [MicroBatch(0, batches, ())])


def _busiest(objective: MaskedModelling, batches: Mapping[StreamName, Batch]) -> float:
    shares = [float(router_health(one.plan)["busiest"]) for _, one in objective(batches).routed]
    return sum(shares) / len(shares)


def _packed_over_padded(size: Size) -> Figures:
    sizes = {"image_size": 128, "patch_size": 16}
    models = {"": make_model(size.preset, size.experts, **sizes), "_dense": make_model(size.preset, None, **sizes)}
    lengths = caption_lengths(size.packed_pairs)
    make = partial(make_batch, "pair", models[""], size.packed_pairs, lengths)
    packed: dict[StreamName, Batch] = {"pair": make()}
    padded: dict[StreamName, Batch] = {"pair": make(pad_text_to=PADDED)}
    objectives = {name: make_objective(config) for name, config in models.items()}
    cases = {
        f"{form}{name}": partial(gradients, objective, batches)
        for name, objective in objectives.items()
        for form, batches in (("packed", packed), ("padded", padded))
    }
    times = timings(cases, size.repeats)
    ratios = {f"packed_over_padded{n}": median_ratio(times[f"packed{n}"], times[f"padded{n}"]) for n in models}
    return {
        **ratios,
        "token_ratio": num_tokens(packed, models[""]) / num_tokens(padded, models[""]),
        **medians(times),
    }


if __name__ == "__main__":
    run(__doc__, measure)
