"""`vlmoe export`: a model in a form that runs elsewhere, checked before it is called done."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmoe_cli.options import JsonOption, PublicOption, PushToOption
from vlmoe_cli.output import Output
from vlmoe_cli.pushing import push_after, push_request, size_words

if TYPE_CHECKING:
    from vlmoe_core.hub.export.run import Receipt

EXAMPLES = (
    "vlmoe export --model runs/quickstart-vqa --format transformers --out exports/vqa",
    "vlmoe export --format safetensors --quantize int8 --out exports/int8",
    "vlmoe export --model runs/quickstart-nli --format onnx --modality text --experts used:0.99 --out exports/nli",
)


def export(
    format: Annotated[str, typer.Option(metavar="safetensors|transformers|onnx|torch-export", help="Kind of files.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write, new or empty.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Run, checkpoint or model folder, or hf-hub:ORG/NAME; by default the newest run.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="fp32|bf16|fp16", help="Type of the weights.", show_default=False)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Weights as whole numbers with scales.", show_default=False)
    ] = None,
    modality: Annotated[
        str | None, typer.Option(metavar="text|vision", help="Leave the other path out.", show_default=False)
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="used:SHARE", help="Keep the experts that carry this share of the routing.", show_default=False
        ),
    ] = None,
    removed: Annotated[
        str, typer.Option(metavar="next|drop", help="Tokens of a removed expert: to the next one, or to none.")
    ] = "next",
    data: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Its data tell what is used and what is reached.", show_default=False),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="A file of weights is cut before it grows beyond this: 500MB, 2GB.", show_default=False
        ),
    ] = None,
    no_visual_tokenizer: Annotated[
        bool, typer.Option("--no-visual-tokenizer", help="Leave the visual tokenizer out.")
    ] = False,
    push_to: PushToOption = None,
    public: PublicOption = False,
    json: JsonOption = False,
) -> None:
    """Write a model as safetensors, for transformers, or as ONNX or torch.export graphs, and check what was written."""
    from dataclasses import asdict

    from vlmoe_core.hub.export.request import make_request
    from vlmoe_core.hub.export.run import export as run_export
    from vlmoe_core.train.trained import load_trained, newest_run

    output = Output(json)
    request = make_request(
        format, out, dtype, quantize, modality, experts, removed, data, max_shard_size, not no_visual_tokenizer
    )
    push = push_request(push_to, public)
    trained = load_trained(model or newest_run())
    output.note(f"model {trained.name}, step {trained.step}")
    receipt = run_export(trained, request, output.note)
    _show(output, receipt, out)
    output.data(asdict(receipt))
    push_after(output, out, push)


def _show(output: Output, receipt: "Receipt", out: Path) -> None:
    check = receipt.check
    same = "the same bit by bit" if check.identical else f"at most {check.max_difference:.2g} apart"
    rows: dict[str, object] = {
        "read back": f"{check.samples} examples in a fresh process: {same}",
        "parameters": f"{receipt.before.parameters:,} to {receipt.after.parameters:,}",
        "files": size_words(receipt.after.bytes),
    }
    if check.tokens:
        rows["flipped tokens"] = f"{100 * check.flipped_share:.3g} % of {check.tokens:,}"
    if receipt.quantised is not None:
        share = receipt.quantised
        rows["int8"] = f"{100 * share.share:.1f} % of the values"
    if receipt.metric_before is not None and receipt.metric_after is not None:
        before, after = receipt.metric_before, receipt.metric_after
        rows[after.name] = f"{before.value:.4g} to {after.value:.4g}, {after.examples:,} examples of data.{after.split}"
    output.record({**rows, "receipt": out / "export.json"}, title=f"{receipt.format}: {out}")
