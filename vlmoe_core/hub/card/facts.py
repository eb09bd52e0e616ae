"""What a card says, in tables and sentences. Each is measured or written in the recipe, or it is not there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePath
from typing import Any

from vlmoe_core.checkpoint.layout import STEP_NAME
from vlmoe_core.data.config import SPLITS, STREAMS
from vlmoe_core.data.naming import file_name, public_details, public_name
from vlmoe_core.hf import is_hub
from vlmoe_core.hub.card.folder import CardFolder, Line
from vlmoe_core.hub.card.text import Markdown, escaped
from vlmoe_core.hub.results import current_results, examples_of, main_metrics, other_metrics
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.train.results import StoredResult

Row = tuple[object, ...]
SWITCHES = (
    "attention", "norm", "sub_norm", "positions", "qkv_bias", "layer_scale", "patch_embed", "expert_pool",
    "text_embed_norm",
)  # fmt: skip
"""Fields of the model that differ from the paper's only where somebody chose so."""
PARTS = {
    "total": "all, weighted",
    "mlm": "words of texts",
    "mim": "patches of images",
    "vlm_text": "words of captions",
    "vlm_image": "patches of captioned images",
}
"""What the parts of a masked-modelling loss predict."""


@dataclass(frozen=True)
class Table:
    """Cells; the first row is the head."""

    title: str
    head: Row
    rows: tuple[Row, ...]
    folded: tuple[Row, ...] = ()
    """Rows that a reader opens."""
    note: str = ""


def model_rows(folder: CardFolder) -> list[Row]:
    """Sizes, experts, parameters."""
    model, sizes = folder.recipe.model, folder.parameters
    more = ", decoder included" if folder.is_tokenizer else ", heads included"
    heads = ", of the encoder alone" if sizes.encoder_alone else more
    rows: list[Row] = [
        ("Blocks", f"{model.layers}{_vl_layers(model)}"),
        ("Width", f"{model.dim:,}, {model.heads} attention heads, {model.hidden:,} inside a feed-forward network"),
        (
            "Images",
            f"{model.image_size} x {model.image_size} pixels, patches of {model.patch_size} x {model.patch_size}",
        ),
    ]
    if model.modality != "vision":
        words = folder.recipe.tokenizers.text.vocab_size
        rows.append(("Texts", f"up to {model.max_text_length} tokens, a vocabulary of {words:,}"))
    rows += [(f"Experts, {pool}", _experts(moe, model.sparse_layers(pool))) for pool, moe in model.pools.items()]
    if model.modality != "both":
        rows.append(("Reads", f"{model.modality} alone"))
    if switches := _switches(model):
        rows.append(("Differs from VL-MoE in", switches))
    rows.append((f"Parameters{heads}", f"{sizes.total:,}"))
    if model.pools and sizes.applied is not None:
        rows.append(("of which a token of each modality uses", f"{sizes.applied:,}"))
    return [*rows, *_weights(folder)]


def _vl_layers(model: ModelConfig) -> str:
    return f"; the top {model.vl_layers} with a network of their own for pairs" if model.vl_layers else ""


def _experts(moe: MoEConfig, layers: tuple[int, ...]) -> str:
    shared = ", and one that every token passes" if moe.shared_expert else ""
    where = f"block {layers[0]}" if len(layers) == 1 else f"each of the blocks {', '.join(map(str, layers))}"
    return (
        f"{moe.num_experts} in {where} (counted from 0), {moe.top_k} a token"
        f"{shared}; router {moe.router.name}; {_capacity(moe.capacity_factor)} in training, "
        f"{_capacity(moe.eval_capacity_factor)} in evaluation{_removed(moe)}"
    )


def _removed(moe: MoEConfig) -> str:
    if moe.kept_experts is None:
        return ""
    left = ", ".join(f"{len(experts)} in block {layer}" for layer, experts in moe.kept_experts.items())
    way = "to the next best one" if moe.removed == "next" else "past the experts"
    return f"; of these are left {left}, tokens of the others go {way}"


def _capacity(factor: float | None) -> str:
    return "dropless" if factor is None else f"capacity {factor:g}"


def _switches(model: ModelConfig) -> str:
    fields = type(model).model_fields
    chosen = {name: getattr(model, name) for name in SWITCHES if getattr(model, name) != fields[name].default}
    return ", ".join(f"{name} {value}" for name, value in chosen.items())


def _weights(folder: CardFolder) -> Iterator[Row]:
    if folder.tensors is None or not folder.is_model_folder:
        return
    infos = list(folder.tensors.infos.values())
    types = ", ".join(sorted({info.dtype for info in infos}))
    yield "Weights", f"{_size(sum(info.nbytes for info in infos))}, {types}"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def training_rows(folder: CardFolder) -> list[Row]:
    """The recipe in short; nothing for an encoder that no run of ours trained."""
    run = folder.run
    if run is None:
        return []
    done = run.train.steps if folder.step is None else folder.step
    rows: list[Row] = [
        ("Trained on", f"the task {folder.task}" if folder.task else _objective(run)),
        ("Started from", started_from(run)),
        ("Steps", f"{done:,}" + (f" of {run.train.steps:,}" if done != run.train.steps else "")),
        ("Examples of a step", ", ".join(f"{run.batch.size.of(s)} {s}" for s in STREAMS if run.batch.size.of(s))),
        ("Optimiser", f"AdamW, peak learning rate {run.optim.lr:g}, weight decay {run.optim.weight_decay:g}"),
        ("Precision", run.train.precision),
        ("Seed", run.seed),
    ]
    return [*rows, *_times(folder, run)]


def _objective(run: Recipe) -> str:
    assert run.objective is not None
    words = {"masked": "masked modelling", "vqkd": "codes of patches that tell a teacher's features (VQ-KD)"}
    return words.get(run.objective.name, run.objective.name)


def started_from(run: Recipe) -> str:
    """The name of what a run started from, without its folder."""
    if run.init in (None, "scratch"):
        return "random weights"
    assert run.init is not None
    sizes = "" if run.init_weights else " (its sizes and tokenizers alone, with random weights)"
    return f"{model_name(run.init)}{sizes}"


def model_name(spec: str) -> str:
    """`hf-hub:ORG/NAME` as it is; of a path the name of the run or folder."""
    if is_hub(spec):
        return spec
    path = PurePath(spec.replace("\\", "/"))
    parts = [part for part in path.parts if part != "checkpoints" and not STEP_NAME.fullmatch(part)]
    name = file_name(parts[-1]) if parts else ""
    return "a folder" if name in ("", ".", "..") else name


def _times(folder: CardFolder, run: Recipe) -> Iterator[Row]:
    lines = [line for line in folder.metrics if "time" in line]
    if len(lines) > 1:
        in_steps = _seconds_in_steps(folder.metrics, run)
        steps = f", {_duration(in_steps)} of it in training steps" if in_steps else ""
        yield "Time", f"{_duration(lines[-1]['time'] - lines[0]['time'])} from first to last line of the log{steps}"
    if machine := _machine(folder.environment):
        yield "Hardware", machine


def _seconds_in_steps(lines: list[Line], run: Recipe) -> float:
    """Pauses, evaluations and checkpoints left out."""
    examples, last, seconds = sum(run.batch.size.of(s) for s in STREAMS), 0, 0.0
    for line in lines:
        if line["split"] == "train" and line.get("samples_per_s"):
            seconds += (line["step"] - last) * examples / line["samples_per_s"]
            last = line["step"]
    return seconds


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{timedelta(seconds=seconds) / timedelta(hours=1):.1f} h"


def _machine(environment: Mapping[str, Any]) -> str:
    devices, cores = environment.get("devices"), environment.get("cores")
    if isinstance(devices, list) and devices:
        return ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    return f"{cores} CPU cores, no GPU" if isinstance(cores, int) else ""


def data_rows(run: Recipe | None) -> list[Row]:
    """The sources of each split and stream."""
    if run is None:
        return []
    return [
        (split, stream, public_name(source), public_details(source))
        for split in SPLITS
        for stream in STREAMS
        for source in getattr(getattr(run.data, split), stream)
    ]


def result_tables(folder: CardFolder) -> list[Table]:
    """What an export changed, what `vlmoe eval` measured, of other steps behind; else the run's last held-out line."""
    here = current_results(folder.results, folder.step)
    steps = sorted({r.step for r in folder.results if r.step != folder.step}, reverse=True)
    elsewhere = [r for step in steps for r in current_results(folder.results, step)]
    tables = [*_export_table(folder), *(_result_table(one, folder) for one in (*here, *elsewhere))]
    return tables if here else [*tables, *_held_out(folder)]


def _export_table(folder: CardFolder) -> list[Table]:
    receipt = folder.exported
    if receipt is None or receipt.metric_before is None or receipt.metric_after is None:
        return []
    before, after = receipt.metric_before, receipt.metric_after
    row = (after.name, *(_value(one.value, one.interval, digits=3) for one in (before, after)))
    title = f"Before and after this export: {after.examples:,} examples of {after.split}"
    return [Table(title, ("", "before", "after"), (row,))]


def _result_table(result: StoredResult, folder: CardFolder) -> Table:
    other = f"step {result.step:,}" if result.step != folder.step else "before the export" if folder.was_changed else ""
    return Table(
        f"{result.task}: {examples_of(result)}, {result.data}",
        ("percent", other or "this model", *result.baselines),
        tuple(_metric_row(result, name) for name in main_metrics(result)),
        tuple(_metric_row(result, name) for name in other_metrics(result)),
        f"Not measured on these weights: {other}." if other else "",
    )


def _metric_row(result: StoredResult, name: str) -> Row:
    baselines = (
        _value(found.get(name), result.baseline_intervals.get(label, {}).get(name))
        for label, found in result.baselines.items()
    )
    own = escaped(_value(result.metrics[name], result.intervals.get(name)))
    return name, Markdown(f"**{own}**"), *baselines


def _value(value: float | None, interval: tuple[float, float] | None, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else "")


def last_held_out(lines: list[Line]) -> Line | None:
    """The last line of held-out figures."""
    return next((line for line in reversed(lines) if line["split"] == "eval"), None)


def _held_out(folder: CardFolder) -> list[Table]:
    last = last_held_out(folder.metrics)
    if last is None:
        return []
    first = next(line for line in folder.metrics if line["split"] == "eval")
    names = [name for name in last if name.startswith(("loss/", "metric/"))]
    parts = [name for name in names if name.startswith("metric/") and f"metric/{name.split('/')[1]}" not in last]
    rows = {name: _held_out_row(name, last, first) for name in names}
    before = f"step {first['step']:,}"
    own = "before the export" if folder.was_changed else "this model"
    limit = folder.run.train.eval_examples if folder.run is not None else 0
    what = "losses in nats" if len(names) == sum(name.startswith("loss/") for name in names) else "losses and metrics"
    title = f"Held-out {what} at step {last['step']:,}, at most {limit:,} examples of each stream"
    shown, folded = (tuple(rows[n] for n in names if (n in parts) == hidden) for hidden in (False, True))
    return [without_empty(Table(title, ("", own, before, "unigram baseline"), shown, folded))]


def _held_out_row(name: str, last: Line, first: Line) -> Row:
    digits = 3 if name.startswith("loss/") else 1
    baseline = first.get(name.replace("loss/", "baseline/", 1)) if name.startswith("loss/") else None
    before = first.get(name) if first is not last else None
    return _loss_name(name), *(_value(value, None, digits) for value in (last[name], before, baseline))


def _loss_name(name: str) -> str:
    kind, _, part = name.partition("/")
    return f"{part}, percent" if kind == "metric" else PARTS.get(part, f"loss of {part}")


def without_empty(table: Table) -> Table:
    """Without columns that say nothing."""
    kept = [n for n in range(len(table.head)) if n == 0 or any(row[n] for row in table.rows)]
    rows, folded = (tuple(tuple(row[n] for n in kept) for row in part) for part in (table.rows, table.folded))
    return Table(table.title, tuple(table.head[n] for n in kept), rows, folded, table.note)
