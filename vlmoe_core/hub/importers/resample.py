"""Resamples the positions of a filled encoder to another image size."""

from vlmoe_core.errors import UsageError
from vlmoe_core.hub.importers.ledger import Ledger, model_config
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.embeddings import resize_positions
from vlmoe_core.model.relative import resize_relative

ABSOLUTE, RELATIVE = "embeddings.image.position", "relative.table"


def resample(ledger: Ledger, config: ModelConfig, image_size: int | None) -> tuple[ModelConfig, list[str]]:
    """The config for images of so many pixels, and a line if positions were resampled to it.

    Raises UsageError if that is no multiple of the patch size.
    """
    if image_size is None or image_size == config.image_size:
        return config, []
    if image_size < 1 or image_size % config.patch_size:
        near = max(1, round(image_size / config.patch_size)) * config.patch_size
        raise UsageError(f"--image-size {image_size} is no multiple of the patch size {config.patch_size}; try {near}")
    wanted = model_config(**{**config.model_dump(), "image_size": image_size})
    length = config.max_text_length
    for name, value in ledger.values.items():
        if name == ABSOLUTE:
            ledger.values[name] = resize_positions(value, wanted.grid)
        elif name.endswith(RELATIVE):
            ledger.values[name] = resize_relative(value, config.grid, wanted.grid, length, length)
    return wanted, [f"positions resampled from {config.grid} x {config.grid} to {wanted.grid} x {wanted.grid} patches"]
