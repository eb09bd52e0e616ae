"""`vlmoe push`: a run, a checkpoint, a model folder or an export onto the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmoe_cli.options import JsonOption, PublicOption, WithImagesOption, WithOptimizerOption
from vlmoe_cli.output import Output
from vlmoe_cli.pushing import plan_rows, said, size_words

EXAMPLES = (
    "vlmoe push runs/quickstart-pretrain --to ORG/NAME --dry-run",
    "vlmoe push runs/quickstart-pretrain --to ORG/NAME --revision v1",
)


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A run (its newest checkpoint), a checkpoint, a model folder or an export.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str, typer.Option(metavar="ORG/NAME", help="Repository on the Hub; created if needed.", show_default=False)
    ],
    public: PublicOption = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch; created if needed.", show_default=False)
    ] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request, or go on with your open one.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.", show_default=False)] = None,
    best: Annotated[bool, typer.Option("--best", help="Of a run: the best checkpoint, not the newest.")] = False,
    with_optimizer: WithOptimizerOption = False,
    with_images: WithImagesOption = False,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Licence of the weights, for the card: apache-2.0.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes; send nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Put a model on the Hub. What was cut short goes on when you type it again."""
    from dataclasses import asdict

    from vlmoe_core.hub import push as hub
    from vlmoe_core.hub.contents import Contents, plan_push

    words = {} if message is None else {"message": message}
    request = hub.PushRequest(to, not public, revision, pr, **words)
    contents = Contents(best, with_optimizer, with_images, license)
    out = Output(json)
    if dry_run:
        files = plan_push(folder, contents, request.repo)
        total = sum(file.size for file in files)
        out.table(plan_rows(files), f"{len(files)} files, {size_words(total)}, would go to {request.repo}")
        listed = [{"path": file.path, "size": file.size} for file in files]
        return out.data({"repo": request.repo, "dry_run": True, "bytes": total, "files": listed})
    pushed = hub.push(folder, request, contents, bars=sys.stderr.isatty())
    out.text(said(pushed))
    out.data({"repo": request.repo, "dry_run": False, **asdict(pushed)})
