"""`vlmoe validate`: what can be known of a run before it starts."""

from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, RecipeArgument, SetOption, StartOption
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.train.validate import Check

EXAMPLES = (
    "vlmoe validate quickstart/pretrain",
    "vlmoe validate my.yaml --set data.root=photos",
    "vlmoe validate paper/base-32e --no-data",
    "vlmoe validate finetune/sick --model runs/flickr8k-pretrain",
)


def validate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    model: StartOption = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Open nothing but recipes: random inputs of their sizes stand in.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check a recipe before a run: sources, tokenizers, model, one step.

    Prints a line for each thing that was checked, then those that were not. The first thing that is wrong ends it
    with one message.
    """
    from vlmoe_core.train.init import Planned, load_planned_recipe, load_run_recipe
    from vlmoe_core.train.validate import validate as checks_of

    out = Output(json)
    if no_data:
        planned = load_planned_recipe(recipe, set_ or (), model)
    else:
        planned = Planned(load_run_recipe(recipe, set_ or (), model), None)
    checks = []
    for check in checks_of(planned.loaded, not no_data, planned.start):
        checks.append(check)
        out.text(f"{_state(check):<13}{check.name}: {check.detail}")
    out.data({"recipe": planned.loaded.name, "data_read": not no_data, "checks": [_as_dict(check) for check in checks]})


def _state(check: "Check") -> str:
    return "ok" if check.done else "not checked"


def _as_dict(check: "Check") -> dict[str, object]:
    return {"name": check.name, "state": _state(check), "detail": check.detail, **check.figures}
