"""How fast pictures become training input, and how long a training step waits for it.

`python -m tests.benchmarks.loader --json` prints one JSON object:

- `speedup`: pictures a second of our decode + crop + normalise over plain Pillow's open, convert, resize and normalise
  (median of interleaved repeats, one process, one thread);
- `speedup_whole`: the same for whole pictures, as in evaluation: no crop and no JPEG draft mode;
- `ours_images_per_s`, `plain_images_per_s`: the medians behind `speedup`;
- `wait_share`: share of a quick-start training step that the loop spends waiting for its next micro-batch, over the
  steps after a warm-up, with the loader's own worker processes; `wait_s`, `step_s`: mean seconds of both;
- `make_s`: mean seconds in which one process makes one micro-batch: the most that a step could wait for one worker.

The JPEGs (500 x 375, quality 90) are drawn by the benchmark itself.
"""

import io
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.benchmarks.common import Figures, median_ratio, run, threads, timings
from vlmoe_core.data.config import AugmentConfig
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.recipe.load import load_recipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import open_stepper
from vlmoe_core.train.session import RunOptions, Session, open_session

BOUNDS = {"speedup": 1.5, "wait_share": 0.05}
"""At least; at most."""

WIDTH, HEIGHT, QUALITY = 500, 375, 90
TARGET = 224
PICTURES = 6
REPEATS = 80
MAX_PIXELS = 178_956_970
AUGMENT = AugmentConfig(crop_scale=(0.2, 1.0), horizontal_flip=0.5)
"""BEiT's crop and mirroring."""

WARMUP_STEPS, STEPS = 10, 40
QUICK_FIT = ("tokenizers.text.fit_texts=500", "tokenizers.visual.fit_images=20", "tokenizers.visual.iterations=2")

Decoder = Callable[[bytes], NDArray[np.float32]]


def make_jpegs(count: int) -> list[bytes]:
    """Smooth random colours with some noise: about as many bytes as a photograph of that size."""
    rng = np.random.default_rng(0)
    return [_jpeg(rng) for _ in range(count)]


def _jpeg(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 25, WIDTH // 25, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """From 0..255 to -1..1. Both sides use it."""
    scaled = pixels.astype(np.float32)
    scaled *= np.float32(1 / 127.5)
    scaled -= np.float32(1)
    return scaled


def plain(data: bytes) -> NDArray[np.float32]:
    """What one writes without thinking of speed."""
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((TARGET, TARGET), Image.Resampling.BICUBIC)
    return normalise(np.asarray(picture)).transpose(2, 0, 1)


def ours(augment: AugmentConfig | None) -> Decoder:
    """Our transform, for training or (None) for evaluation."""
    transform, rng = ImageTransform(TARGET, augment, MAX_PIXELS), random.Random(0)
    return lambda data: normalise(transform(data, rng))


def decode_all(decoder: Decoder, jpegs: list[bytes]) -> None:
    """Decode the pictures one after the other."""
    for data in jpegs:
        decoder(data)


def measure_decoding(pictures: int = PICTURES, repeats: int = REPEATS) -> dict[str, float]:
    """The figures of our transform against plain Pillow."""
    jpegs = make_jpegs(pictures)
    decoders = {"plain": plain, "ours": ours(AUGMENT), "ours_whole": ours(None)}
    with threads(1):
        times = timings({name: partial(decode_all, decoder, jpegs) for name, decoder in decoders.items()}, repeats)
    return {
        "speedup": median_ratio(times["plain"], times["ours"]),
        "speedup_whole": median_ratio(times["plain"], times["ours_whole"]),
        "ours_images_per_s": pictures / median(times["ours"]),
        "plain_images_per_s": pictures / median(times["plain"]),
    }


def measure_waiting(warmup: int, steps: int, overrides: tuple[str, ...] = ()) -> dict[str, float]:
    """The figures of the quick start's training loop."""
    loaded = load_recipe("quickstart/pretrain", overrides)
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(loaded, RunOptions(out=Path(folder) / "run"), Reporter())
        waits, rests = _waits(session, warmup + steps)
        start = time.perf_counter()
        for number in range(3):
            session.train_data[number]
        make_s = (time.perf_counter() - start) / 3
    wait_s, rest_s = (sum(seconds[warmup:]) / steps for seconds in (waits, rests))
    return {"wait_share": wait_s / (wait_s + rest_s), "wait_s": wait_s, "step_s": wait_s + rest_s, "make_s": make_s}


def _waits(session: Session, steps: int) -> tuple[list[float], list[float]]:
    """Seconds until each step's micro-batches were there, and seconds of the step itself."""
    recipe = session.recipe
    stepper = open_stepper(session)
    micros = session.train_micros()
    waits, rests = [], []
    for step in range(steps):
        start = time.perf_counter()
        taken = list(islice(micros, recipe.batch.num_micro))
        there = time.perf_counter()
        stepper(step, taken)
        waits.append(there - start)
        rests.append(time.perf_counter() - there)
    return waits, rests


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring."""
    if quick:
        return {**measure_decoding(2, 2), **measure_waiting(1, 2, QUICK_FIT), "bounds": BOUNDS}
    return {**measure_decoding(), **measure_waiting(WARMUP_STEPS, STEPS), "bounds": BOUNDS}


if __name__ == "__main__":
    run(__doc__, measure)
