"""Brings weights that saw other pixel values to ours, which are x / 127.5 - 1, by the linear map of the patches.

W ((x - mean) / deviation) + b is a linear map of ours too, so that nothing is lost.
"""

import json
from collections.abc import Sequence

import torch

from vlmoe_core.errors import CheckpointError
from vlmoe_core.hub.importers.ledger import Ledger
from vlmoe_core.hub.importers.torch_files import Source

PATCH = "embeddings.image.patch.proj"
OURS = 0.5
"""Our mean and deviation of each channel, where pixels reach from 0 to 1."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""BEiT v2 on ImageNet-1k."""
SETTINGS = "preprocessor_config.json"


def fold_pixels(ledger: Ledger, source: Source, imagenet: bool) -> list[str]:
    """Change the filled patch embedding where the source's pixels were not ours; a line about it.

    The source's mean and deviation are ImageNet's where that is asked for, those of the preprocessor_config.json of a
    folder, else ours, as BEiT-3, VLMo and BEiT have them. Raises CheckpointError for settings that can't be read.
    """
    if f"{PATCH}.weight" not in ledger.values:
        return []
    mean, deviation = IMAGENET if imagenet else _settings(source)
    if set(mean) == set(deviation) == {OURS}:
        return []
    weight_DCP = ledger.values[f"{PATCH}.weight"].double().unflatten(1, (3, -1))  # type: ignore[no-untyped-call]
    scale_C, shift_C = (_channels(values) for values in (deviation, mean))
    ledger.values[f"{PATCH}.bias"] = (
        ledger.values[f"{PATCH}.bias"].double() + (weight_DCP.sum(2) * (OURS - shift_C) / scale_C).sum(1)
    ).float()
    ledger.values[f"{PATCH}.weight"] = (weight_DCP * (OURS / scale_C)[:, None]).flatten(1).float()
    return [f"pixels with mean {tuple(mean)} and deviation {tuple(deviation)} folded into the patch embedding"]


def _settings(source: Source) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of a transformers folder; ours where it says none."""
    path = None if source.folder is None else source.folder / SETTINGS
    if path is None or not path.is_file():
        return (OURS,) * 3, (OURS,) * 3
    try:
        settings = json.loads(path.read_bytes())
        mean, deviation = settings.get("image_mean", [OURS] * 3), settings.get("image_std", [OURS] * 3)
        if len(mean) != 3 or len(deviation) != 3 or min(deviation) <= 0:
            raise ValueError("image_mean and image_std must be three numbers each")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say how pixels are normalised: {error}") from error
    return mean, deviation


def _channels(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
