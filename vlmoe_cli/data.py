"""`vlmoe data index | check | tokenize`: the data of a recipe, before a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, RecipeArgument, SetOption, examples, group
from vlmoe_cli.output import Output
from vlmoe_cli.tokenizing import EXAMPLES, tokenize

if TYPE_CHECKING:
    from vlmoe_core.data.check import ImageSizes, SourceSurvey, TextLengths
    from vlmoe_core.train.survey import Checked, SourceRow

SHOWN_BROKEN = 10

app = group(
    help="Build index caches ahead, look at the data of a recipe, store its visual tokens.",
    epilog=examples(
        "vlmoe data index flickr8k/pretrain",
        "vlmoe data check quickstart/pretrain --limit 500",
        "vlmoe data tokenize quickstart/pretrain --out tokens",
    ),
)


@app.command(epilog=examples("vlmoe data index my.yaml --set data.root=photos"))
def index(recipe: RecipeArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Build the index caches of a recipe's sources, so that a run starts sooner.

    A text tokenizer that the recipe does not name is fitted as the run will fit it, because packs of sentences depend
    on it; it is not kept.
    """
    from dataclasses import asdict

    from vlmoe_cli.progress import PlainProgress
    from vlmoe_core.train.init import load_run_recipe
    from vlmoe_core.train.survey import index_data

    out = Output(json)
    indexed = index_data(load_run_recipe(recipe, set_ or ()).recipe, PlainProgress())
    out.table([asdict(row) for row in indexed.sources])
    out.text(f"\nindex caches: {indexed.cache}")
    out.data({"sources": [asdict(row) for row in indexed.sources], "cache": indexed.cache})


@app.command(
    epilog=examples(
        "vlmoe data check quickstart/pretrain --limit 500",
        "vlmoe data check my.yaml --set data.root=photos --out report --json",
    )
)
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Read at most N examples of each source, evenly spread; default: all.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the contact sheet.")] = Path(),
    json: JsonOption = False,
) -> None:
    """Count a recipe's examples and the broken ones, measure texts and pictures, and draw a contact sheet.

    The contact sheet shows the first training examples of each stream, with what is hidden from the model drawn on
    them. Exit code 1 if an example is broken and data.on_error is raise.
    """
    from vlmoe_cli.progress import PlainProgress
    from vlmoe_core.errors import DataError
    from vlmoe_core.train.init import load_run_recipe
    from vlmoe_core.train.survey import check_data

    output = Output(json)
    loaded = load_run_recipe(recipe, set_ or ())
    checked = check_data(loaded, limit, out, PlainProgress())
    _print(output, checked)
    output.data(_document(checked))
    if checked.broken and loaded.recipe.data.on_error == "raise":
        raise DataError(
            f"broken examples: {len(checked.broken):,}, the first: {checked.broken[0]}; mend them, or set "
            "data.on_error=skip to leave their places empty"
        )


app.command(epilog=EXAMPLES)(tokenize)


def _print(output: Output, checked: "Checked") -> None:
    pairs = checked.sources
    output.table([_place(row) | _counts(row, survey) for row, survey in pairs], "examples")
    output.table(
        [_place(row) | _lengths(s.text) for row, s in pairs if s.text], "\ntext lengths in tokens, before cutting"
    )
    output.table([_place(row) | _sizes(s.image) for row, s in pairs if s.image], "\npicture sizes in pixels, as stored")
    if checked.broken:
        output.text(f"\nbroken examples{f', the first {SHOWN_BROKEN}' if len(checked.broken) > SHOWN_BROKEN else ''}")
        output.text("\n".join(checked.broken[:SHOWN_BROKEN]))
    output.text(f"\ncontact sheet: {checked.sheet}")


def _place(row: "SourceRow") -> dict[str, object]:
    return {"split": row.split, "stream": row.stream, "source": row.source}


def _counts(row: "SourceRow", survey: "SourceSurvey") -> dict[str, object]:
    return {"examples": row.examples, "read": survey.read, "broken": len(survey.broken)}


def _lengths(text: "TextLengths") -> dict[str, object]:
    return {
        "min": text.minimum,
        "median": text.median,
        "95 %": text.percentile_95,
        "max": text.maximum,
        "max_text": text.limit,
        "cut": f"{text.cut:.1%}",
    }


def _sizes(image: "ImageSizes") -> dict[str, object]:
    shown = {"smallest": image.smallest, "median": image.median, "largest": image.largest}
    return {name: f"{width} x {height}" for name, (width, height) in shown.items()}


def _document(checked: "Checked") -> dict[str, object]:
    from dataclasses import asdict

    sources = [asdict(row) | asdict(survey) for row, survey in checked.sources]
    return {"sources": sources, "broken": len(checked.broken), "contact_sheet": checked.sheet}
