"""What a routing trace costs in a forward pass.

`python -m tests.benchmarks.route_trace --json` prints one JSON object, float32 on 2 threads of a CPU, preset small (8
layers, width 384, patch 16 at 224 px) with 16 experts in every second block, three streams with masks:

- `traced_over_plain`: seconds of the forward passes inside a trace, over those of the same ones outside;
- `traced_over_plain_top2`: the same where each token goes to two experts;
- `tokens`: tokens of the three forward passes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from tests.benchmarks.common import Figures, median_ratio, medians, run, threads, timings
from tests.benchmarks.workload import PAD, SEP, WORDS, num_tokens, three_streams
from vlmoe_core.analysis.routing.api import trace
from vlmoe_core.analysis.routing.tokens import SpecialIds
from vlmoe_core.data.batch import Batch
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder

BOUNDS = {"traced_over_plain": 1.15}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    preset: str
    experts: int
    """E of each sparse layer."""
    examples: int
    """Of each stream; texts alone have 96 to 128 tokens, as packed sentences have."""
    repeats: int
    threads: int


FULL = Size("small", experts=16, examples=16, repeats=7, threads=2)
QUICK = Size("tiny", experts=4, examples=2, repeats=1, threads=1)


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring."""
    size = QUICK if quick else FULL
    encoders = {name: _encoder(make_config(size, k)) for name, k in (("", 1), ("_top2", 2))}
    batches = three_streams(encoders[""].config, size.examples)
    cases = {
        f"{form}{name}": partial(forward, encoder, batches.values())
        for name, encoder in encoders.items()
        for form, forward in (("plain", _plain), ("traced", _traced))
    }
    with threads(size.threads), torch.no_grad():
        times = timings(cases, size.repeats)
    ratios = {f"traced_over_plain{n}": median_ratio(times[f"traced{n}"], times[f"plain{n}"]) for n in encoders}
    return {**ratios, "tokens": num_tokens(batches, encoders[""].config), **medians(times), "bounds": BOUNDS}


def make_config(size: Size, top_k: int) -> ModelConfig:
    """Sparse in every second block, with the capacity of training, so that tokens are dropped."""
    moe = {"num_experts": size.experts, "top_k": top_k, "eval_capacity_factor": 1.25}
    return ModelConfig.model_validate({"preset": size.preset, "moe": {"vision": moe, "text": moe}})


def _encoder(config: ModelConfig) -> Encoder:
    torch.manual_seed(0)
    return Encoder(config, WORDS).eval()


def _plain(encoder: Encoder, batches: Iterable[Batch]) -> None:
    for batch in batches:
        encoder(batch)


def _traced(encoder: Encoder, batches: Iterable[Batch]) -> None:
    with trace(encoder, special=SpecialIds(sep=SEP, pad=PAD)):
        _plain(encoder, batches)


if __name__ == "__main__":
    run(__doc__, measure)
