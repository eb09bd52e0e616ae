"""Arguments and options that several verbs share, so that their help never differs."""

from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a shipped recipe (vlmoe recipes ls).", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one value of the recipe: --set train.steps=100. Repeatable.",
        show_default=False,
    ),
]
StartOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Start from this model: a run, checkpoint or model folder, or hf-hub:ORG/NAME; beats the recipe's init.",
        show_default=False,
    ),
]
OutOption = Annotated[Path | None, typer.Option(help="Run folder; by default runs/NAME.", show_default=False)]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|PATH|hf-hub:ORG/NAME",
        help="Go on with a run: auto takes the newest checkpoint of its folder, or starts it.",
        show_default=False,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the run folder.")]
NumProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Start so many processes through Accelerate's launcher.", show_default=False),
]
OnErrorOption = Annotated[
    str | None,
    typer.Option(
        metavar="raise|skip",
        help="A broken example ends the command with its name, or is left out and counted.",
        show_default=False,
    ),
]
PushToOption = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="ORG/NAME[@BRANCH]",
        help="Also put it on the Hub, into this repository; a new one is private unless --public.",
        show_default=False,
    ),
]
PublicOption = Annotated[
    bool, typer.Option("--public", help="Everybody may see what is pushed; by default a new repository is private.")
]
WithOptimizerOption = Annotated[
    bool, typer.Option("--with-optimizer", help="Also push the optimiser's state, to go on training from the Hub.")
]
WithImagesOption = Annotated[
    bool, typer.Option("--with-images", help="Push the report with its pictures, which are cut from your data.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]


# Typer reads a --help that was not given as None, which it converts through pydantic; False needs no conversion.
_SETTINGS = {"help_option_names": ["-h", "--help"], "default_map": {"help": False}}


def group(**settings: Any) -> typer.Typer:
    """A group of verbs, with plain help: rich's takes longer to import than all else that help needs."""
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=_SETTINGS,
        **settings,
    )


def examples(*commands: str) -> str:
    """The epilog of a verb: lines to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)
