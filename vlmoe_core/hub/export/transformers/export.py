"""Writes a repository that transformers loads with remote code, without this package."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmoe_core.checkpoint.layout import MODEL
from vlmoe_core.checkpoint.shards import MAX_SHARD_BYTES, index_name, separate_tied, write_shard, write_shards
from vlmoe_core.checkpoint.write import refuse_filled
from vlmoe_core.hub.export.chance import refuse_chance
from vlmoe_core.hub.export.transformers.bundle import bundle
from vlmoe_core.hub.export.transformers.settings import (
    dump,
    image_processor_config,
    model_config,
    processor_config,
    tokenizer_config,
    tokenizer_json,
)
from vlmoe_core.train.trained import Trained


def export_transformers(trained: Trained, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a model with its code, its tokenizer and its processor into a folder.

    The tensors have the names and shapes that they have in memory: the experts of a layer are one tensor (E, ...).
    Needs nothing of transformers itself.

    Args:
        trained: the model.
        folder: where to write; new, or empty.
        max_shard_bytes: size of a weights file; a larger tensor has a file of its own.

    Raises:
        UsageError: the folder holds files, or a part of the model can't go along.
        CheckpointError: a tensor can't be stored.
    """
    recipe = trained.recipe
    refuse_chance(recipe.model)
    refuse_filled(folder)
    state = trained.objective.state_dict()
    files = bundle() | {
        "config.json": dump(model_config(trained, state)),
        "tokenizer.json": tokenizer_json(trained.tokenizers.text),
        "tokenizer_config.json": dump(tokenizer_config(trained)),
        "preprocessor_config.json": dump(image_processor_config(recipe)),
        "processor_config.json": dump(processor_config(recipe)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    write_weights(folder, state, max_shard_bytes)


def write_weights(folder: Path, state: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors as transformers names files: one file, or shards and their index. Tied ones are written once."""
    stored, _ = separate_tied(dict(state))
    total = sum(tensor.nbytes for tensor in stored.values())
    if total <= max_shard_bytes:
        write_shard(folder / f"{MODEL}.safetensors", stored)
        return
    weight_map = write_shards(folder, MODEL, stored, max_shard_bytes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index_name(MODEL)).write_text(dump(index), encoding="utf-8")
