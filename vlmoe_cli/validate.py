"""`vlmoe validate`: what can be known of a run before it starts."""

from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, RecipeArgument, SetOption
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.train.validate import Check

EXAMPLES = (
    "vlmoe validate quickstart/pretrain",
    "vlmoe validate my.yaml --set data.root=photos",
    "vlmoe validate my.yaml --no-data",
)


def validate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Open nothing but the recipe: random inputs of its sizes stand in.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check a recipe before a run: sources, tokenizers, model, one step.

    Prints a line for each thing that was checked, then those that were not. The first thing that is wrong ends it
    with one message.
    """
    from vlmoe_core.train.init import load_run_recipe
    from vlmoe_core.train.validate import validate as checks_of

    out = Output(json)
    loaded = load_run_recipe(recipe, set_ or ())
    checks = []
    for check in checks_of(loaded, read_data=not no_data):
        checks.append(check)
        out.text(f"{_state(check):<13}{check.name}: {check.detail}")
    out.data({"recipe": loaded.name, "data_read": not no_data, "checks": [_as_dict(check) for check in checks]})


def _state(check: "Check") -> str:
    return "ok" if check.done else "not checked"


def _as_dict(check: "Check") -> dict[str, object]:
    return {"name": check.name, "state": _state(check), "detail": check.detail, **check.figures}
