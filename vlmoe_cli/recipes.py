"""`vlmoe recipes ls | show | cp`: the shipped recipes, to read and to own."""

from pathlib import Path
from typing import Annotated

import typer

from vlmoe_cli.options import JsonOption, examples, group
from vlmoe_cli.output import Output

app = group(
    help="List, print and copy the shipped recipes.",
    epilog=examples("vlmoe recipes ls", "vlmoe recipes cp quickstart/pretrain my.yaml"),
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a shipped recipe, or a YAML file.", show_default=False)
]


@app.command(epilog=examples("vlmoe recipes ls", "vlmoe recipes ls --json"))
def ls(json: JsonOption = False) -> None:
    """List the shipped recipes."""
    from vlmoe_core.recipe.catalogue import shipped

    out = Output(json)
    rows = [{"name": name, "what it is": summary} for name, summary in shipped().summaries().items()]
    out.table(rows)
    out.data([{"name": row["name"], "summary": row["what it is"]} for row in rows])


@app.command(epilog=examples("vlmoe recipes show quickstart/pretrain"))
def show(name: NameArgument) -> None:
    """Print a recipe, with what it extends merged in."""
    from vlmoe_core.recipe.load import read_recipe

    Output().text(read_recipe(name).text)


@app.command(
    epilog=examples(
        "vlmoe recipes cp quickstart/pretrain my.yaml", "vlmoe recipes cp quickstart/pretrain my.yaml --force"
    )
)
def cp(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Copy a recipe to a file that you own.

    What it extends is merged in: the copy stands alone.
    """
    from vlmoe_core.recipe.load import copy_recipe

    copy_recipe(name, file, overwrite=force)
    Output().note(f"wrote {file}; next: vlmoe validate {file}")
