"""`vlmoe data tokenize`: the visual tokens of a run, stored once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, RecipeArgument, SetOption, examples
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.train.tokenize import Tokenized

EXAMPLES = examples(
    "vlmoe data tokenize quickstart/pretrain --out tokens",
    "vlmoe pretrain quickstart/pretrain --set tokenizers.visual.tokens=tokens",
)


def tokenize(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where they are stored; by default the recipe's tokenizers.visual.tokens, else tokens/NAME.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Store the visual tokens of every image that a run of a recipe reads, so that the run need not encode.

    They are keyed by position and crop: the run refuses them where its pixels differ. Interrupted, give the command
    again: it goes on. A tokenizer that the recipe does not name is fitted as the run would fit it, and kept.
    """
    from vlmoe_cli.progress import ScoringProgress
    from vlmoe_core.train.init import load_run_recipe
    from vlmoe_core.train.tokenize import default_tokens, tokenize_images

    output = Output(json)
    loaded = load_run_recipe(recipe, set_ or ())
    said = loaded.recipe.tokenizers.visual.tokens
    folder = out or (Path(said) if said else default_tokens(loaded.name))
    try:
        stored = tokenize_images(loaded.recipe, folder, ScoringProgress(output.note))
    except KeyboardInterrupt:
        output.note(f"interrupted; the same command goes on with the files that are missing in {folder}")
        raise
    _print_stored(output, stored)


def _print_stored(output: Output, stored: "Tokenized") -> None:
    manifest = stored.manifest
    parts = [
        {"split": p.split, "stream": p.stream, "positions": p.positions, "files": p.num_files} for p in manifest.parts
    ]
    output.table(parts, "stored tokens")
    broken = f", {stored.broken:,} of them broken" if stored.broken else ""
    output.text(f"\n{manifest.positions:,} positions{broken}: --set tokenizers.visual.tokens={stored.folder}")
    output.data(
        {
            "folder": stored.folder,
            "fingerprint": manifest.fingerprint,
            "precision": manifest.precision,
            "positions": manifest.positions,
            "broken": stored.broken,
            "shards_written": stored.written,
            "parts": parts,
        }
    )
