"""Our encoder against the same-size BEiT-3 of the `torchscale` package, which pads captions.

`python -m tests.benchmarks.peers --json` prints one JSON object; float32, 2 threads of a CPU, pair stream, forward and
backward of the encoder alone (a sum of squares of its final states as loss), preset small dense, 128 px, patch 16:

- `ours_over_torchscale`: our seconds, captions packed, over torchscale's, captions padded to 64;
- `ours_padded_over_torchscale`: the same with our captions padded as well;
- `ours_million_params`, `torchscale_million_params`.

torchscale and fairscale are installed with `pip install --no-deps torchscale fairscale`; without them the benchmark
says so and measures nothing. timm, of which torchscale needs one function, is replaced here.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from tests.benchmarks.common import Figures, median_ratio, medians, run, threads, timings
from tests.benchmarks.workload import PAD, WORDS, caption_lengths, make_batch, make_model
from vlmoe_core.data.batch import Batch
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder

BOUNDS = {"ours_over_torchscale": 0.85}
PADDED = 64
ABSENT = "the torchscale package is absent"
INSTALL = "pip install --no-deps torchscale fairscale"


def available() -> bool:
    """Whether torchscale and what it can't do without are installed."""
    return all(importlib.util.find_spec(name) for name in ("torchscale", "fairscale"))


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring, or why there are none."""
    if not available():
        return {"skipped": f"{ABSENT}; install it with: {INSTALL}"}
    preset, pairs, repeats, num_threads = ("tiny", 4, 1, 1) if quick else ("small", 32, 7, 2)
    config = make_model(preset, None, image_size=128, patch_size=16)
    lengths = caption_lengths(pairs)
    packed = make_batch("pair", config, pairs, lengths)
    padded = make_batch("pair", config, pairs, lengths, pad_text_to=PADDED)
    torch.manual_seed(0)
    ours, theirs = Encoder(config, WORDS), build_beit3(config)
    cases = {
        "ours": partial(_backward, ours, lambda: ours(packed).states_TD),
        "ours_padded": partial(_backward, ours, lambda: ours(padded).states_TD),
        "torchscale": partial(_backward, theirs, _forward_beit3(theirs, padded, pairs)),
    }
    with threads(num_threads):
        times = timings(cases, repeats)
    return {
        "ours_over_torchscale": median_ratio(times["ours"], times["torchscale"]),
        "ours_padded_over_torchscale": median_ratio(times["ours_padded"], times["torchscale"]),
        "ours_million_params": _million_params(ours),
        "torchscale_million_params": _million_params(theirs),
        **medians(times),
        "bounds": BOUNDS,
    }


def build_beit3(config: ModelConfig) -> nn.Module:
    """BEiT-3 of the sizes of a config, with torchscale's defaults else."""
    stand_in_for_timm()
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    args = EncoderConfig(
        encoder_embed_dim=config.dim,
        encoder_attention_heads=config.heads,
        encoder_ffn_embed_dim=config.hidden,
        encoder_layers=config.layers,
        drop_path_rate=config.drop_path,
        img_size=config.image_size,
        patch_size=config.patch_size,
        vocab_size=WORDS,
        multiway=True,
        no_output_layer=True,
    )
    model: nn.Module = BEiT3(args)
    return model


def stand_in_for_timm() -> None:
    """Put the one function of timm that torchscale needs where it looks for it."""

    def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
        stay = 1 - probability if training else 1.0
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(stay) / stay

    layers = ModuleType("timm.models.layers")
    layers.__dict__["drop_path"] = drop_path
    sys.modules.setdefault("timm.models.layers", layers)


def _forward_beit3(model: nn.Module, padded: Batch, pairs: int) -> Callable[[], Tensor]:
    """A forward pass over the same pictures, words and masks."""
    ids = padded.text_ids_T.view(pairs, PADDED)
    pixels = padded.pixels_ICHW.float() / 127.5 - 1

    def forward() -> Tensor:
        out: Tensor = model(
            textual_tokens=ids,
            visual_tokens=pixels,
            text_padding_position=ids == PAD,
            vision_masked_position=padded.patch_mask_IP,
        )["encoder_out"]
        return out

    return forward


def _backward(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    forward().square().sum().backward()


def _million_params(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


if __name__ == "__main__":
    run(__doc__, measure)
