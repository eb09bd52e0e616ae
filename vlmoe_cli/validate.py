"""`vlmoe validate`: what can be known of a run before it starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, RecipeArgument, SetOption, StartOption
from vlmoe_cli.output import Output
from vlmoe_cli.rehearsing import checks_of_world

if TYPE_CHECKING:
    from vlmoe_core.train.init import Planned
    from vlmoe_core.train.validate import Check

EXAMPLES = (
    "vlmoe validate quickstart/pretrain",
    "vlmoe validate my.yaml --set data.root=photos",
    "vlmoe validate paper/base-32e --no-data --world 32",
    "vlmoe validate finetune/sick --model runs/flickr8k-pretrain",
)


def validate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    model: StartOption = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Open nothing but recipes: random inputs of their sizes stand in.")
    ] = False,
    world: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also rehearse the run on so many processes, in this one: what each holds, what it sends.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a recipe before a run: sources, tokenizers, model, one step.

    Prints a line for each thing that was checked, then those that were not. The first thing that is wrong ends it
    with one message.
    """
    from vlmoe_core.train.init import Planned, load_planned_recipe, load_run_recipe

    out = Output(json)
    if no_data:
        planned = load_planned_recipe(recipe, set_ or (), model)
    else:
        planned = Planned(load_run_recipe(recipe, set_ or (), model), None)
    checks = []
    for check in _checks(planned, not no_data, world):
        checks.append(check)
        out.text(f"{_state(check):<13}{check.name}: {check.detail}")
    out.data(
        {
            "recipe": planned.loaded.name,
            "data_read": not no_data,
            "world": world,
            "checks": [_as_dict(check) for check in checks],
        }
    )


def _checks(planned: "Planned", read_data: bool, world: int | None) -> "Iterator[Check]":
    """Those of one process, those of several, then what was not checked."""
    from vlmoe_core.analysis.estimate.world import check_world
    from vlmoe_core.train.validate import validate as checks_of

    recipe, open_questions = planned.loaded.recipe, []
    if world is not None:
        check_world(recipe, world)
    for check in checks_of(planned.loaded, read_data, planned.start):
        if check.done:
            yield check
        else:
            open_questions.append(check)
    if world is not None:
        yield from checks_of_world(recipe, world)
    yield from open_questions


def _state(check: "Check") -> str:
    return "ok" if check.done else "not checked"


def _as_dict(check: "Check") -> dict[str, object]:
    return {"name": check.name, "state": _state(check), "detail": check.detail, **check.figures}
