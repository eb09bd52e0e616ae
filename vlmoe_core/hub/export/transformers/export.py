"""Writes a repository that transformers loads with remote code, without this package."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmoe_core.checkpoint.layout import MODEL
from vlmoe_core.checkpoint.shards import (
    MAX_SHARD_BYTES,
    index_name,
    plan_shards,
    separate_tied,
    shard_name,
    write_shard,
)
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.export.transformers.bundle import bundle
from vlmoe_core.hub.export.transformers.settings import (
    check_exportable,
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
    check_exportable(recipe)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; choose another folder with --out")
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
    plan = plan_shards({name: tensor.nbytes for name, tensor in stored.items()}, max_shard_bytes)
    if len(plan) == 1:
        write_shard(folder / f"{MODEL}.safetensors", stored)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        shard = shard_name(MODEL, number, len(plan))
        write_shard(folder / shard, {name: stored[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    total = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index_name(MODEL)).write_text(dump(index), encoding="utf-8")
