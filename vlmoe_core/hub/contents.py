"""What is sent to the Hub of a folder: a run, a checkpoint, a model folder, or an export.

The files of the model lie at the top of the repository, so that `hf-hub:ORG/NAME` is a model folder whatever was
pushed; the run's metrics, environment and report lie beside them.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vlmoe_core.checkpoint.files import listed_files
from vlmoe_core.checkpoint.layout import MANIFEST, MODEL, OPTIMIZER, RECIPE, STATE, list_checkpoints, step_folder
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.checkpoint.manifest import Manifest, manifest_text, read_manifest
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.state import read_state
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.hub.card.build import CARD, GENERATED, PLACEHOLDER, build_card, license_in, somebody_wrote
from vlmoe_core.hub.card.folder import ENVIRONMENT, METRICS, REPORT
from vlmoe_core.hub.card.receipts import EXPORTED, IMPORTED
from vlmoe_core.hub.results import eval_results_files
from vlmoe_core.tokenizers.visual import CONFIG_FILE
from vlmoe_core.train.results import FOLDER as RESULTS
from vlmoe_core.train.results import read_results

PAGE = f"{REPORT}/routing.html"
PICTURE = f"{REPORT}/reconstructions.png"
TITLE = re.compile(r"^# .*$", re.MULTILINE)
NEVER = (".git", ".cache", "__pycache__", ".DS_Store")
LEFTOVERS = ("*.partial", "*.removed", "*.tmp")


@dataclass(frozen=True)
class Contents:
    """What is taken along, of what a folder holds."""

    best: bool = False
    """Of a run: its best checkpoint instead of its newest."""
    with_optimizer: bool = False
    """The optimiser's state too, so that training can go on from the Hub; about twice the model's size."""
    with_images: bool = False
    """The report with its pictures, which are cut from the data; without: drawn anew without them, or left out."""
    license: str | None = None
    """The Hub's word for the licence of the weights, for the card; None: none is said."""


@dataclass(frozen=True)
class PushFile:
    """A file as it will lie in the repository."""

    path: str
    """Relative, with '/'."""
    content: Path | bytes
    """The file on disk, or what is sent instead of one."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def plan_push(
    folder: Path, contents: Contents = Contents(), repo: str = PLACEHOLDER, there: Path | None = None
) -> list[PushFile]:
    """The files that a push of `folder` sends, sorted by path, card and results among them. Reads no tensor.

    Args:
        folder: a run (its newest checkpoint), a checkpoint of a run, a model folder, or an export.
        contents: what is taken along.
        repo: ORG/NAME, which the card names.
        there: what the repository holds already, as `published` says; None: nothing, or nobody asked.

    Raises:
        UsageError: there is nothing to push, or `contents` asks for what the folder does not have.
        CheckpointError: the checkpoint is not whole.
    """
    checkpoint = model_in(folder, contents.best)
    if checkpoint is None:
        found = _export_files(folder, repo)
    else:
        run = _run_of(checkpoint)
        beside = _everything(checkpoint) if run is None else _run_files(run, contents.with_images)
        found = {**beside, **_model_files(checkpoint, contents.with_optimizer)}
        found.pop(CARD, None)
        found |= described(checkpoint, run or checkpoint, repo, contents.license, there)
    return [PushFile(path, found[path]) for path in sorted(found)]


def described(
    checkpoint: Path, home: Path, repo: str, license: str | None = None, there: Path | None = None
) -> dict[str, Path | bytes]:
    """Card and results of a model as they are published. A README.md that somebody wrote stays, here and there.

    Args:
        checkpoint: the model.
        home: the run or model folder that holds its results, and its card if there is one.
        repo: ORG/NAME, which the card names.
        license: as in `Contents`; None: the one that the card there names.
        there: what the repository holds already. Its results count if they are of the same weights.
    """
    same = there if there is not None and same_weights(there, checkpoint) else None
    places = [same, home] if same is not None else [home]
    found: dict[str, Path | bytes] = {
        path.relative_to(place).as_posix(): path for place in places for path in place.glob(f"{RESULTS}/*.json")
    }
    results = [one for place in places for one in read_results(place)]
    files = eval_results_files(results, read_state(checkpoint / STATE).step)
    found |= {path: text.encode() for path, text in files.items()}
    if somebody_wrote(home / CARD):
        return {**found, CARD: home / CARD}
    if there is not None and somebody_wrote(there / CARD):
        return found
    license = license or (license_in(there / CARD) if there is not None else None)
    card = build_card(checkpoint, repo=repo, along=places[::-1], license=license)
    return {**found, CARD: card.encode()}


def same_weights(there: Path, checkpoint: Path) -> bool:
    """Whether two folders hold the same weights, as their manifests say."""
    try:
        return (there / MANIFEST).is_file() and _weights(there) == _weights(checkpoint)
    except CheckpointError:
        return False


def _weights(folder: Path) -> dict[str, str]:
    files = read_manifest(folder).files
    return {name: record.sha256 for name, record in files.items() if fnmatch(name, f"{MODEL}-*.safetensors")}


def model_in(folder: Path, best: bool = False) -> Path | None:
    """The checkpoint or model folder that a push of `folder` sends; None: it holds none, such as an export to ONNX.

    Raises:
        UsageError: there is no such folder, or a run has no checkpoint (of the best step).
    """
    is_run = folder.name == "checkpoints" or (folder / METRICS).exists() or bool(list_checkpoints(folder))
    if folder.is_dir() and not (folder / MANIFEST).exists() and not is_run:
        return None
    found = resolve(folder)
    if not best:
        return found
    run, step = _run_of(found), read_state(found / STATE).best_step
    if run is None or step is None or not step_folder(run, step).is_dir():
        raise UsageError(f"{folder} knows no best checkpoint; leave --best away, or name a checkpoint folder")
    return step_folder(run, step)


def _run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None: it is a model folder."""
    where = checkpoint.resolve().parent
    return where.parent if where.name == "checkpoints" and (where.parent / RECIPE).is_file() else None


def _model_files(checkpoint: Path, with_optimizer: bool) -> dict[str, Path | bytes]:
    """The files that the manifest lists, and a manifest that lists no more than those."""
    manifest = read_checkpoint(checkpoint).manifest
    kept = {n: record for n, record in manifest.files.items() if with_optimizer or not _is_optimizer(n)}
    if with_optimizer and not any(map(_is_optimizer, kept)):
        raise UsageError(f"{checkpoint} holds no optimiser; leave --with-optimizer away")
    files: dict[str, Path | bytes] = {name: checkpoint / name for name in kept}
    return files | {MANIFEST: manifest_text(Manifest(manifest.created, manifest.versions, kept)).encode()}


def _is_optimizer(name: str) -> bool:
    return name.startswith((f"{OPTIMIZER}-", f"{OPTIMIZER}."))


def _run_files(run: Path, with_images: bool) -> dict[str, Path | bytes]:
    """What goes along from a run folder, beside card and results.

    Nothing else is looked at: a run that goes on adds lines to its metrics and removes checkpoints.
    """
    files: dict[str, Path | bytes] = {ENVIRONMENT: run / ENVIRONMENT} if (run / ENVIRONMENT).is_file() else {}
    if (run / METRICS).is_file():
        files[METRICS] = _whole_lines(run / METRICS)
    return files | report_files(run / REPORT, with_images)


def _everything(folder: Path) -> dict[str, Path | bytes]:
    """Every file under a folder, but for what no reader needs and the optimiser's state."""
    names = [name for name in listed_files(folder) if (folder / name).is_file() and not _is_junk(name)]
    return {name: folder / name for name in names if not _is_optimizer(name)}


def _export_files(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """All of an export, or of an imported tokenizer. Raises UsageError for others, in which anything may lie."""
    is_tokenizer = (folder / IMPORTED).is_file() and (folder / CONFIG_FILE).is_file()
    if not (folder / EXPORTED).is_file() and not is_tokenizer:
        raise UsageError(
            f"{folder} is no run, checkpoint, model folder or export of vlmoe; 'hf upload' sends other folders"
        )
    found = _everything(folder)
    if CARD in found:
        found[CARD] = _naming(folder / CARD, repo)
    return found


def _naming(card: Path, repo: str) -> Path | bytes:
    """The card of an export, which was generated before anybody knew where it would lie."""
    text = card.read_text(encoding="utf-8", errors="replace")
    if GENERATED not in text:
        return card
    return TITLE.sub(f"# {repo.rpartition('/')[2]}", text, count=1).replace(PLACEHOLDER, repo).encode()


def _is_junk(name: str) -> bool:
    parts = name.split("/")
    return any(part in NEVER or any(fnmatch(part, leftover) for leftover in LEFTOVERS) for part in parts)


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def report_files(folder: Path, with_images: bool) -> dict[str, Path | bytes]:
    """A report on routing or codes as it is published, in `report/`: numbers, figures and page.

    Args:
        folder: where it lies; nothing where there is none.
        with_images: the page with its pictures, which are cut from the data, and the images that codes tell of;
            without: drawn anew without them, or left out.
    """
    if not folder.is_dir():
        return {}
    files = {f"{REPORT}/{name}": path for name, path in _everything(folder).items()}
    if not with_images:
        files.pop(PICTURE, None)
    if PAGE in files and not with_images:
        del files[PAGE]
        files |= dict(_page_without_pictures(folder))
    return files


def _page_without_pictures(report: Path) -> Iterator[tuple[str, bytes]]:
    """The report drawn from its numbers alone; nothing where they are not there, or of another version of vlmoe."""
    from pydantic import TypeAdapter, ValidationError

    from vlmoe_core.analysis.routing.report import write_report
    from vlmoe_core.analysis.routing.summary import SCHEMA, RoutingSummary

    try:
        plain: dict[str, Any] = json.loads((report / "routing.json").read_bytes())
        summary = TypeAdapter(RoutingSummary).validate_python(plain)
    except (OSError, ValueError, ValidationError):
        return
    if summary.schema != SCHEMA:
        return
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "routing.html"
        write_report(summary, page)
        yield PAGE, page.read_bytes()
