"""What `pretrain` says of a run that trained a visual tokenizer."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmoe_core.recipe.config import Recipe

FIGURES = {
    "loss/teacher": "1 - cosine to the teacher",
    "loss/commitment": "squared distance to the code",
    "codes/used": "share of the codes in use",
    "codes/perplexity": "perplexity of the codes",
    "codes/pixel_error": "squared error of a pixel",
}
"""Of a line of held-out figures, in words."""
PICTURED = "flickr8k/pretrain"
"""The shipped recipe that small tokenizers are made for."""


def codes_report(run: Path) -> dict[str, Any]:
    """The numbers of the report on the codes; empty where there is none."""
    from vlmoe_core.analysis.codes.files import NUMBERS

    path = run / "report" / NUMBERS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def code_rows(first: Mapping[str, Any], last: Mapping[str, Any], codes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each held-out figure, before and after; beside the pixels' error that of k-means, where it is known."""
    rows = [
        {"figure": words, "before": first.get(name), "after": last[name]}
        for name, words in FIGURES.items()
        if name in last
    ]
    if kmeans := codes.get("kmeans"):
        errors = {FIGURES["codes/pixel_error"]: kmeans["mse"]}
        return [{**row, "k-means": errors.get(row["figure"])} for row in rows]
    return rows


def next_with_codes(recipe: "Recipe", run: Path) -> str:
    """The command that pretrains a model on the codes: a shipped recipe where the grid is the same."""
    from vlmoe_core.recipe.load import load_recipe
    from vlmoe_core.train.visual import use_of_tokenizer

    fits = load_recipe(PICTURED).recipe.model.grid == recipe.model.grid
    root = ["--set", f"data.root={recipe.data.root}"] if fits and recipe.data.root is not None else []
    size = ["--set", f"tokenizers.visual.codebook_size={recipe.tokenizers.visual.codebook_size}"]
    return shlex.join(["vlmoe", "pretrain", PICTURED if fits else "RECIPE", *root, *use_of_tokenizer(str(run)), *size])
