"""What `vlmoe route-stats` leaves behind: JSON, a report, figures."""

import json
import shutil
from pathlib import Path

from accelerate import PartialState

from vlmoe_core.analysis.routing.figures import write_figures
from vlmoe_core.analysis.routing.report import write_report
from vlmoe_core.analysis.routing.request import Asked, make_request
from vlmoe_core.analysis.routing.run import Found, Process, route
from vlmoe_core.data.config import STREAMS
from vlmoe_core.errors import UsageError
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.trained import load_trained


def report_folder(checkpoint: Path) -> Path:
    """Where a checkpoint's report lies unless it is said: `report/` of its run; of a copied one, `report/` here."""
    return checkpoint.parent.parent / "report" if checkpoint.parent.name == "checkpoints" else Path("report")


def report_on(run: Path) -> Path | None:
    """Route `data.eval` of a run by its newest checkpoint, in this process alone, and write the report.

    Its path; null for a model without experts, or a run without `data.eval`. Raises VlmoeError where data or disk don't
    allow it.
    """
    trained = load_trained(run)
    held_out = trained.recipe.data.eval
    if not trained.recipe.model.pools or not any(getattr(held_out, stream) for stream in STREAMS):
        return None
    found = route(make_request(trained, Asked(split="eval")), None, Process(PartialState().device), Reporter())
    return write_all(found, report_folder(trained.path))[0] if found is not None else None


def make_folder(folder: Path) -> None:
    """Make sure, before anything is computed, that a report can be written. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error


def write_all(found: Found, folder: Path) -> list[Path]:
    """Write `routing.html`, `routing.json` and the figures; older ones go. Raises UsageError if the disk refuses."""
    make_folder(folder)
    plain, page, figures = folder / "routing.json", folder / "routing.html", folder / "figures"
    try:
        text = json.dumps(found.summary.as_json(), ensure_ascii=False)
        plain.write_text(text, encoding="utf-8", errors="backslashreplace")
        write_report(found.summary, page, found.patches, found.examples)
        shutil.rmtree(figures, ignore_errors=True)
        return [page, plain, *write_figures(found.summary, figures)]
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"no report can be written to {folder}: {error.strerror or error}; choose another with --out")
