"""The folder of a run: what lies where, and who may write into it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from vlmoe_core.environment import environment
from vlmoe_core.errors import RecipeError, UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import load_recipe

PARTIAL_RECIPE = "recipe.yaml.tmp"
FREE_FIELDS = (
    "out",
    "tokenizers.visual.tokens",
    "data.root",
    "data.workers",
    "data.prefetch",
    "train.trackers",
    "train.keep_last",
    "parallel",
)
"""Fields that may change when a run goes on: where things lie, how fast they come, who computes what."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path
    """The folder itself."""

    @property
    def recipe(self) -> Path:
        """The merged recipe of the run."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizers(self) -> Path:
        """Both tokenizers, written before step 0."""
        return self.path / "tokenizers"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "environment.json"

    @property
    def holds_run(self) -> bool:
        """A run was started here."""
        return self.recipe.exists()


def default_folder(name: str) -> Path:
    """Where a run of the recipe of that name lies if nobody says otherwise: `runs/quickstart-pretrain`."""
    return Path("runs") / name.replace("/", "-")


def start_folder(path: Path, recipe_text: str, overwrite: bool) -> RunFolder:
    """Create the folder of a new run.

    Raises:
        UsageError: the folder holds a run and `overwrite` is not asked for, or it holds something else.
    """
    folder = RunFolder(path)
    if folder.holds_run and not overwrite:
        raise UsageError(
            f"{path} already holds a run; continue it with --resume auto, replace it with --overwrite, "
            "or choose another folder with --out"
        )
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is not a folder; choose another one with --out")
    if path.exists() and not folder.holds_run and any(p.name != PARTIAL_RECIPE for p in path.iterdir()):
        raise UsageError(f"{path} holds files that are no run; choose an empty folder with --out")
    if folder.holds_run:
        _remove_run(folder)
    path.mkdir(parents=True, exist_ok=True)
    partial = path / PARTIAL_RECIPE
    partial.write_text(recipe_text, encoding="utf-8")
    partial.rename(folder.recipe)
    return folder


def write_environment(folder: RunFolder) -> None:
    """Note what the run goes on with, anew at each start."""
    folder.environment.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")


def check_same_recipe(began_in: Path, recipe: Recipe) -> None:
    """A run goes on with the recipe it began with, which lies in a folder, but for what changes no number.

    Raises:
        RecipeError: names the fields that differ.
    """
    began, now = _flat(load_recipe(str(RunFolder(began_in).recipe)).recipe), _flat(recipe)
    differing = sorted(key for key in began.keys() | now.keys() if began.get(key) != now.get(key))
    changed = [key for key in differing if not key.startswith(FREE_FIELDS)]
    if changed:
        shown = "; ".join(f"{key} was {began.get(key)}, is {now.get(key)}" for key in changed[:5])
        raise RecipeError(
            f"the run in {began_in} began with another recipe ({shown}); give the same one to go on, "
            "or another --out to start anew"
        )


def _flat(recipe: Recipe) -> dict[str, object]:
    flat: dict[str, object] = {}

    def visit(prefix: str, value: object) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            flat[prefix] = value
            return
        for key, inner in items:
            visit(f"{prefix}.{key}" if prefix else str(key), inner)

    visit("", recipe.model_dump(mode="json"))
    return flat


def _remove_run(folder: RunFolder) -> None:
    """Remove what a run wrote and nothing else; the recipe last, so that a cut removal is still known as a run."""
    for path in (folder.checkpoints, folder.tokenizers, folder.path / "report"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.metrics, folder.environment, folder.recipe):
        path.unlink(missing_ok=True)
