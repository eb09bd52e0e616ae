"""`vlmoe predict masked`: what a pretrained model has learned, seen."""

from pathlib import Path
from typing import Annotated

import typer

from vlmoe_cli.options import JsonOption, examples, group
from vlmoe_cli.output import Output

app = group(
    help="Try a model on your own pictures and text.",
    epilog=examples('vlmoe predict masked --text "a red [MASK] left of a circle"'),
)


@app.command(
    epilog=examples(
        'vlmoe predict masked --text "a red [MASK] left of a circle"',
        'vlmoe predict masked --image scene.png --text "a [MASK] square" --out filled.png',
    )
)
def masked(
    text: Annotated[
        str | None, typer.Option(help="Words, with [MASK] for the ones to predict.", show_default=False)
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture; some patches are hidden and filled in.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Run or checkpoint folder; by default the newest run under runs/.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Words for each [MASK].")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the hidden patches.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG of the picture: as it is, hidden, filled in.")] = Path("filled.png"),
    json: JsonOption = False,
) -> None:
    """Fill the [MASK]s of a text and the hidden patches of a picture."""
    from vlmoe_core.analysis.masked import fill_gaps, save_picture, stream_of
    from vlmoe_core.train.trained import load_trained, newest_run

    output = Output(json)
    trained = load_trained(model or newest_run(stream_of(image, text)))
    output.note(f"model {trained.path}, step {trained.step}")
    filled = fill_gaps(trained, image, text, top, seed)
    rows = [
        {"[MASK]": gap.place + 1, "word": word, "probability": probability}
        for gap in filled.gaps
        for word, probability in gap.words
    ]
    output.table(rows)
    if filled.picture is not None:
        save_picture(filled.picture, out)
        output.text(f"{filled.hidden} hidden patches filled in: {out}")
    output.data(
        {"model": trained.path, "masks": rows, "hidden": filled.hidden, "picture": out if filled.picture else None}
    )
