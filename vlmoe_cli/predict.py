"""`vlmoe predict`: a model on your own pictures and text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, examples, group
from vlmoe_cli.output import Output

if TYPE_CHECKING:
    from vlmoe_core.data.example import Example

ModelOption = Annotated[
    Path | None,
    typer.Option(
        help="Run, checkpoint or model folder, or hf-hub:ORG/NAME; by default the newest run that fits.",
        show_default=False,
    ),
]
ImagesOption = Annotated[
    list[Path] | None, typer.Option("--image", help="A picture, or a folder of them. Repeatable.", show_default=False)
]
InputOption = Annotated[
    Path | None,
    typer.Option("--input", help="JSON lines, one example each, with pictures and texts.", show_default=False),
]
TopOption = Annotated[int, typer.Option(min=1, max=5, help="Answers for each example.")]

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
    model: ModelOption = None,
    top: Annotated[int, typer.Option(min=1, help="Words for each [MASK].")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the hidden patches.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG of the picture: as it is, hidden, filled in; by default filled.png.", show_default=False
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Fill the [MASK]s of a text and the hidden patches of a picture."""
    from vlmoe_core.analysis.masked import fill_gaps, save_picture, stream_of
    from vlmoe_core.errors import UsageError
    from vlmoe_core.train.trained import load_trained, newest_pretrained

    output = Output(json)
    trained = load_trained(model or newest_pretrained(stream_of(image, text)))
    output.note(f"model {trained.name}, step {trained.step}")
    filled = fill_gaps(trained, image, text, top, seed)
    if filled.undrawn is not None and out is not None:
        raise UsageError(f"--out {out}: {filled.undrawn}; leave --out away")
    rows = [
        {"[MASK]": gap.place + 1, "word": word, "probability": probability}
        for gap in filled.gaps
        for word, probability in gap.words
    ]
    output.table(rows)
    drawn = (out or Path("filled.png")) if filled.picture is not None else None
    if filled.picture is not None and drawn is not None:
        save_picture(filled.picture, drawn)
        output.text(f"{filled.hidden} hidden patches filled in: {drawn}")
    if filled.undrawn is not None:
        output.note(filled.undrawn)
    output.data({"model": trained.name, "masks": rows, "hidden": filled.hidden, "picture": drawn})


@app.command(epilog=examples('vlmoe predict vqa --image photo.jpg --question "what colour is the square?"'))
def vqa(
    image: ImagesOption = None,
    question: Annotated[str | None, typer.Option(help="What to ask of each picture.", show_default=False)] = None,
    input_: InputOption = None,
    model: ModelOption = None,
    top: TopOption = 3,
    json: JsonOption = False,
) -> None:
    """Answer a question about a picture."""
    from vlmoe_core.analysis.answers import pictures

    def own() -> "Sequence[Example]":
        return [_with(one, text=_given(question, "--question")) for one in pictures(image or [])]

    _answer("vqa", _one_of(own, bool(image or question), input_), model, top, Output(json))


@app.command(epilog=examples('vlmoe predict nlvr2 --image left.png --image right.png --statement "both show a star"'))
def nlvr2(
    image: ImagesOption = None,
    statement: Annotated[str | None, typer.Option(help="What to judge.", show_default=False)] = None,
    input_: InputOption = None,
    model: ModelOption = None,
    json: JsonOption = False,
) -> None:
    """Judge a statement about several pictures."""
    from vlmoe_core.analysis.answers import pictures

    def own() -> "Sequence[Example]":
        found = pictures(image or [])
        more = tuple(one.image for one in found[1:])
        return [_with(found[0], text=_given(statement, "--statement"), more_images=more)]

    _answer("nlvr2", _one_of(own, bool(image or statement), input_), model, 2, Output(json))


@app.command(epilog=examples("vlmoe predict classification --image photos"))
def classification(
    image: ImagesOption = None,
    input_: InputOption = None,
    model: ModelOption = None,
    top: TopOption = 3,
    json: JsonOption = False,
) -> None:
    """Name the class of each picture."""
    from vlmoe_core.analysis.answers import pictures

    own = lambda: pictures(image or [])  # noqa: E731
    _answer("classification", _one_of(own, bool(image), input_), model, top, Output(json))


@app.command(epilog=examples('vlmoe predict nli --premise "all shapes are red" --hypothesis "no shape is blue"'))
def nli(
    premise: Annotated[str | None, typer.Option(help="What is given.", show_default=False)] = None,
    hypothesis: Annotated[str | None, typer.Option(help="What may follow from it.", show_default=False)] = None,
    input_: InputOption = None,
    model: ModelOption = None,
    json: JsonOption = False,
) -> None:
    """Tell whether a premise entails a hypothesis."""
    from vlmoe_core.data.example import Example

    def own() -> "Sequence[Example]":
        return [Example("premise", text=_given(premise, "--premise"), second_text=_given(hypothesis, "--hypothesis"))]

    _answer("nli", _one_of(own, bool(premise or hypothesis), input_), model, 3, Output(json))


@app.command(epilog=examples('vlmoe predict retrieval --image photos --text "two dogs on a beach"'))
def retrieval(
    image: ImagesOption = None,
    text: Annotated[list[str] | None, typer.Option(help="A caption. Repeatable.", show_default=False)] = None,
    input_: InputOption = None,
    model: ModelOption = None,
    top: Annotated[int, typer.Option(min=1, help="Pairs to show, the best ones.")] = 10,
    json: JsonOption = False,
) -> None:
    """Rank pairs of pictures and captions."""
    from dataclasses import asdict

    from vlmoe_core.analysis.answers import match, pictures, read_examples
    from vlmoe_core.errors import UsageError
    from vlmoe_core.train.trained import load_finetuned, newest_finetuned

    def own() -> "Sequence[Example]":
        return [*pictures(image or []), *(_caption(one) for one in text or [])]

    out = Output(json)
    asked = _one_of(own, bool(image or text), input_)
    given = list(read_examples(asked)) if isinstance(asked, Path) else list(asked())
    shown, captions = [one for one in given if one.image is not None], [one.text for one in given if one.text]
    if not shown:
        raise UsageError(f"no line of {input_} has an 'image'; retrieval ranks pairs of a picture and a text")
    if not captions:
        raise UsageError("nothing to look for: give one or more --text, or --input with a file that has texts")
    trained = load_finetuned(model or newest_finetuned("retrieval"), "retrieval")
    out.note(f"model {trained.name}, step {trained.step}")
    matches = match(trained, shown, captions, top)
    out.table([asdict(one) for one in matches])
    out.data({"model": trained.name, "matches": [asdict(one) for one in matches]})


def _caption(text: str) -> "Example":
    from vlmoe_core.data.example import Example

    return Example("caption", text=text)


def _with(example: "Example", **fields: object) -> "Example":
    from dataclasses import replace

    return replace(example, **fields)  # type: ignore[arg-type]


def _given(text: str | None, option: str) -> str:
    from vlmoe_core.errors import UsageError

    if not text:
        raise UsageError(f"{option} is missing: give it, or --input with a file of examples")
    return text


def _one_of(
    own: "Callable[[], Sequence[Example]]", given: bool, file: Path | None
) -> "Path | Callable[[], Sequence[Example]]":
    """The file of examples, or what the other options say."""
    from vlmoe_core.errors import UsageError

    if file is not None and given:
        raise UsageError(
            "--input has pictures and texts of its own: leave the other options away, or leave --input away"
        )
    return own if file is None else file


def _answer(
    task: str, asked: "Path | Callable[[], Sequence[Example]]", model: Path | None, top: int, out: Output
) -> None:
    """Answers to own examples, or to those of a file, as a table or as JSON."""
    from vlmoe_core.analysis.answers import answer, read_examples
    from vlmoe_core.train.trained import load_finetuned, newest_finetuned

    found = list(read_examples(asked)) if isinstance(asked, Path) else list(asked())
    trained = load_finetuned(model or newest_finetuned(task), task)
    out.note(f"model {trained.name}, step {trained.step}")
    answers = answer(trained, found)
    rows = [
        {"example": example.name, "answer": label, "probability": probability}
        for example, ranked in zip(found, answers, strict=True)
        for label, probability in list(zip(ranked.labels, ranked.probabilities, strict=True))[:top]
    ]
    out.table(rows)
    out.data({"task": task, "model": trained.name, "answers": rows})
