"""What `vlmoe route-stats` leaves behind: JSON, a report, figures."""

import json
from pathlib import Path

from accelerate import PartialState

from vlmoe_core.analysis.routing.figures import write_figures
from vlmoe_core.analysis.routing.report import write_report
from vlmoe_core.analysis.routing.request import Asked, make_request
from vlmoe_core.analysis.routing.run import Found, Process, route
from vlmoe_core.errors import UsageError
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.trained import load_trained


def report_folder(checkpoint: Path) -> Path:
    """Where the report of a checkpoint lies unless it is said: `report/` of its run."""
    return checkpoint.parent.parent / "report"


def report_on(run: Path) -> Path | None:
    """Route the held-out examples of a run by its newest checkpoint, in this process alone, and write the report.

    Its path; null for a model without experts. Raises VlmoeError where data or disk don't allow it.
    """
    trained = load_trained(run)
    if not trained.recipe.model.pools:
        return None
    found = route(make_request(trained, Asked()), None, Process(PartialState().device), Reporter())
    return write_all(found, report_folder(trained.path))[0] if found is not None else None


def write_all(found: Found, folder: Path) -> list[Path]:
    """Write `routing.json`, `routing.html` and the figures. Raises UsageError if the folder can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plain, page = folder / "routing.json", folder / "routing.html"
        plain.write_text(json.dumps(found.summary.as_json(), ensure_ascii=False), encoding="utf-8")
        write_report(found.summary, page, found.patches, found.examples)
        return [page, plain, *write_figures(found.summary, folder / "figures")]
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the report can't be written to {folder}: {reason}; choose another with --out") from error
