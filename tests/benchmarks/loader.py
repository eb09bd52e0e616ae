"""How fast pictures become training input.

`python -m tests.benchmarks.loader --json` prints one JSON object:

- `speedup`: pictures a second of our decode + crop + normalise over plain Pillow's open, convert, resize and normalise
  (median of interleaved repeats, one process, one thread);
- `speedup_whole`: the same for whole pictures, as in evaluation: no crop and no JPEG draft mode;
- `ours_images_per_s`, `plain_images_per_s`: the medians behind `speedup`.

The JPEGs (500 x 375, quality 90) are drawn by the benchmark itself.
"""

import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vlmoe_core.data.config import AugmentConfig
from vlmoe_core.data.images import ImageTransform

WIDTH, HEIGHT, QUALITY = 500, 375, 90
TARGET = 224
PICTURES = 6
REPEATS = 80
MAX_PIXELS = 178_956_970
AUGMENT = AugmentConfig(crop_scale=(0.2, 1.0), horizontal_flip=0.5)
"""BEiT's crop and mirroring."""

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


def images_per_second(paths: Mapping[str, Decoder], jpegs: Sequence[bytes], repeats: int) -> dict[str, list[float]]:
    """Each path's speed in each repeat; the paths take turns, so that a slow moment of the machine meets all."""
    speeds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            start = time.perf_counter()
            for data in jpegs:
                path(data)
            speeds[name].append(len(jpegs) / (time.perf_counter() - start))
    return speeds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the repeats' own ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def measure_decoding(pictures: int = PICTURES, repeats: int = REPEATS) -> dict[str, float]:
    """The figures of the module's docstring."""
    paths = {"plain": plain, "ours": ours(AUGMENT), "ours_whole": ours(None)}
    jpegs = make_jpegs(pictures)
    images_per_second(paths, jpegs[:2], 1)
    speeds = images_per_second(paths, jpegs, repeats)
    return {
        "speedup": median_ratio(speeds["ours"], speeds["plain"]),
        "speedup_whole": median_ratio(speeds["ours_whole"], speeds["plain"]),
        "ours_images_per_s": statistics.median(speeds["ours"]),
        "plain_images_per_s": statistics.median(speeds["plain"]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    figures = measure_decoding()
    if as_json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    else:
        print("\n".join(f"{name:>20} {value:10.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
