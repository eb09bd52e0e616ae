"""The program `vlmoe`: every verb is one line below, and one file beside this one.

A verb's file imports typer and vlmoe_cli at its top, and vlmoe_core inside its function, so that help needs neither
torch nor pydantic.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vlmoe_cli import (
    bench,
    checkpoint,
    data,
    env,
    estimate,
    evaluate,
    export,
    finetune,
    imports,
    predict,
    pretrain,
    push,
    recipes,
    route_stats,
    upcycle,
    validate,
)
from vlmoe_cli.errors import DEBUG_VARIABLE, guarded, show_tracebacks
from vlmoe_cli.options import examples, group

app = group(epilog=examples("vlmoe recipes ls", "vlmoe pretrain quickstart/pretrain"))


@app.callback()
def vlmoe(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", envvar=DEBUG_VARIABLE, help="Show the traceback of an error; stands before or after the verb."
        ),
    ] = False,
) -> None:
    """Pretrain, finetune, evaluate, analyse and publish vision-language sparse mixture-of-experts transformers."""
    if debug:
        show_tracebacks()


# One line a verb, in the order of the help: app.command(epilog=...)(module.function); for a group, app.add_typer(...).
app.command(
    epilog=examples("vlmoe pretrain quickstart/pretrain", "vlmoe pretrain my.yaml --set optim.lr=1e-3 --out runs/mine")
)(pretrain.pretrain)
app.command(epilog=examples(*finetune.EXAMPLES))(finetune.finetune)
app.command(name="eval", epilog=examples(*evaluate.EXAMPLES))(evaluate.evaluate)
app.command(name="route-stats", epilog=examples(*route_stats.EXAMPLES))(route_stats.route_stats)
app.command(epilog=examples(*export.EXAMPLES))(export.export)
app.command(epilog=examples(*push.EXAMPLES))(push.push)
app.command(name="import", epilog=examples(*imports.EXAMPLES))(imports.import_weights)
app.command(epilog=examples(*upcycle.EXAMPLES))(upcycle.upcycle)
app.command(epilog=examples(*validate.EXAMPLES))(validate.validate)
app.command(epilog=examples(*estimate.EXAMPLES))(estimate.estimate)
app.add_typer(data.app, name="data")
app.add_typer(predict.app, name="predict")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(recipes.app, name="recipes")
app.add_typer(bench.app, name="bench")
app.command()(env.env)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `vlmoe` with these arguments, by default those of the process; always ends with SystemExit."""
    # OpenMP reads it when torch is loaded. Threads that spin while they wait take the cores from the loader's processes
    # and from all else on the machine: a training step beside two busy programs took 5.7 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    typed = _debug_first(sys.argv[1:] if arguments is None else arguments)
    guarded(lambda: app(typed, prog_name="vlmoe"))


def _debug_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with a `--debug` moved to the front, so that it may be added at the end of a line."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" not in options:
        return list(arguments)
    rest = list(arguments)
    rest.remove("--debug")
    return ["--debug", *rest]
