"""What `vlmoe export` does: change a model, write it, read it back in a fresh process, compare, say what came out."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlmoe_core.checkpoint.files import PARTIAL, put_in_place, sha256, sync_tree
from vlmoe_core.checkpoint.layout import MANIFEST, name_of
from vlmoe_core.checkpoint.write import library_versions, refuse_filled
from vlmoe_core.data.config import SPLITS, STREAMS
from vlmoe_core.errors import HubError
from vlmoe_core.hub.card.build import CARD, build_card
from vlmoe_core.hub.export.formats import TOLERANCE, Check, FormatName, WriteOptions, format_of
from vlmoe_core.hub.export.measure import Measured, measure
from vlmoe_core.hub.export.quantise import QuantisedShare
from vlmoe_core.hub.export.samples import samples_of
from vlmoe_core.hub.export.shrink import Cut, cut_of, shrink
from vlmoe_core.train.scoring import data_of, prepared_as
from vlmoe_core.train.trained import Trained

RECEIPT = "export.json"
SAMPLES = 32
"""Examples of each stream that an export is compared on."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for."""

    format: FormatName
    """One of `FORMATS`."""
    out: Path
    """Folder, new or empty."""
    write: WriteOptions
    """How the weights are written."""
    cut: Cut
    """What of the model is left out."""
    data: str | None = None
    """A recipe whose data tell which experts are used, and on which export and model are compared and measured; null:
    the model's own."""
    limit: int = 1000
    """Most examples that a measurement before and after takes."""


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    parameters: int
    """Values of encoder and heads."""
    bytes: int
    """Of them in memory, or of the files."""


@dataclass(frozen=True)
class Receipt:
    """What came out; export.json beside the files."""

    format: FormatName
    source: str
    """Name of the model's folder, in a run with the run's; no path of the machine."""
    source_manifest: str
    """SHA-256 of its manifest."""
    step: int
    """Optimiser steps that it was trained for."""
    options: dict[str, Any]
    """What was asked for, beyond the format."""
    check: Check
    """Read back in a fresh process."""
    before: Size
    after: Size
    quantised: QuantisedShare | None
    """How much is int8."""
    metric_before: Measured | None
    """Where the model was changed: what it reached."""
    metric_after: Measured | None
    """And what the export reaches."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    seconds: float
    """Duration."""


def export(trained: Trained, request: ExportRequest, say: Say) -> Receipt:
    """Write a model in a format, with its receipt; an export that does not answer as the model does is not left behind.

    Args:
        trained: the model.
        request: what is asked for.
        say: is told how far it is.

    Raises:
        UsageError: something asked for is not built, or the folder holds files.
        DataError: the data can't be read: their examples are what an export is compared on.
        HubError: the export does not open, or answers otherwise.
    """
    start, kind = time.monotonic(), format_of(trained, request.format, request.cut.asked)
    refuse_filled(request.out)
    kind.refuse(trained, request.write)
    changed = request.cut.asked or request.write.rounds
    cut = _cut(trained, request, say)
    reads = _reads(cut, request.data)
    samples = samples_of(reads(cut), SAMPLES)
    before = _measured(reads(trained), request, say, "before") if changed else None
    say(f"writing {request.format}")
    partial = request.out.with_name(request.out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        written = kind.write(cut, partial, request.write)
        say("reading it back in a fresh process")
        check = _checked(kind.check(written.trained, partial, samples), kind.exact, request)
        after = _measured(reads(written.trained), request, say, "after") if changed else None
        receipt = Receipt(
            format=request.format,
            source=name_of(trained.path),
            source_manifest=sha256(trained.path / MANIFEST),
            step=trained.step,
            options=_options(request),
            check=check,
            before=_size_of(trained),
            after=Size(_size_of(cut).parameters, _bytes_of(partial)),
            quantised=written.quantised,
            metric_before=before,
            metric_after=after,
            versions=library_versions(),
            seconds=time.monotonic() - start,
        )
        (partial / RECEIPT).write_text(json.dumps(asdict(receipt), indent=2, default=str) + "\n", encoding="utf-8")
        (partial / CARD).write_text(build_card(partial, repo=None, beside=(trained.path,)), encoding="utf-8")
        sync_tree(partial)
        put_in_place(partial, request.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return receipt


def _cut(trained: Trained, request: ExportRequest, say: Say) -> Trained:
    """The model without what is left out."""
    if not request.cut.asked:
        return trained
    say("leaving out what is not asked for")
    return shrink(trained, cut_of(trained, request.cut, request.data))


def _reads(cut: Trained, recipe: str | None) -> Callable[[Trained], Trained]:
    """Lets a model read the data of a recipe, null: its own, as far as the export takes such inputs."""
    own, batch = cut.recipe.data, cut.recipe.batch
    data = own if recipe is None else prepared_as(own, data_of(recipe))
    if cut.recipe.task is None:
        others: dict[str, tuple[()]] = {stream: () for stream in STREAMS if not batch.size.of(stream)}
        data = data.model_copy(update={name: getattr(data, name).model_copy(update=others) for name in SPLITS})
    return lambda model: replace(model, recipe=model.recipe.model_copy(update={"data": data, "batch": batch}))


def _measured(trained: Trained, request: ExportRequest, say: Say, when: str) -> Measured:
    say(f"measuring the model {when}")
    return measure(trained, request.limit)


def _checked(check: Check, exact: bool, request: ExportRequest) -> Check:
    """Raises HubError for an export that is not what it should be."""
    if check.identical if exact else check.holds:
        return check
    close = f"at most {TOLERANCE:g} apart, at most {TOLERANCE:g} of the tokens flipped"
    raise HubError(
        f"the export to {request.format} does not answer as the model does, so it was not kept: largest difference "
        f"{check.max_difference:.3g}, {check.flipped_share:.3g} of the tokens went to other experts; wanted: "
        f"{'every bit the same' if exact else close}"
    )


def _options(request: ExportRequest) -> dict[str, Any]:
    data = None if request.data is None else Path(request.data).name
    return {**asdict(request.write), **asdict(request.cut), "data": data}


def _size_of(trained: Trained) -> Size:
    parameters = list(trained.objective.parameters())
    return Size(sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters))


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
