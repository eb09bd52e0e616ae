"""Run folders for pushes: real checkpoints of a few numbers, and what lies beside them."""

import json
from pathlib import Path

import torch

from vlmoe_core.analysis.routing.summary import RoutingSummary
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_checkpoint, write_model
from vlmoe_core.hub.contents import Contents, PushFile, plan_push

RECIPE = "model: {layers: 1, dim: 16, heads: 2, hidden: 32, vl_layers: 0, patch_size: 4, image_size: 8}\n"


def tokenizers(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "tokenizer.json").write_text('{"model": "words"}')


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(16, 16, generator=generator) for i in range(4)}


def save(run: Path, step: int, best_step: int | None = None) -> Path:
    """A checkpoint whose tensors depend on the step, in two shards of the model and more of the optimiser."""
    model = tensors(step)
    moments = {f"exp_avg.{name}": tensor * 0.1 for name, tensor in model.items()}
    state = RunState(step=step, positions={"pair": step}, best_step=best_step, recipe="toy")
    return write_checkpoint(run, model, moments, state, RECIPE, tokenizers, max_shard_bytes=2_500)


def make_run(run: Path) -> Path:
    """A finished run of two checkpoints, with a report."""
    for step in (10, 20):
        save(run, step, best_step=10)
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "metrics.jsonl").write_text('{"step": 20, "split": "eval"}\n{"step": 2')
    (run / "environment.json").write_text("{}")
    (run / "tokenizers").mkdir()
    (run / "tokenizers" / "unfinished.json.tmp").write_text("")
    summary = RoutingSummary("step 20", 20, "data", {}, {}, {"image": 1}, ())
    (run / "report" / "figures").mkdir(parents=True)
    (run / "report" / "routing.json").write_text(json.dumps(summary.as_json()))
    (run / "report" / "routing.html").write_text("a page with data:image/webp;base64,AAAA")
    (run / "report" / "figures" / "loads.png").write_bytes(b"PNG")
    return run


def make_model(folder: Path, seed: int = 0) -> Path:
    """A model folder with a card."""
    write_model(folder, tensors(seed), RunState(step=0, positions={}), RECIPE, tokenizers, max_shard_bytes=2_500)
    (folder / "README.md").write_text("# Mine\n")
    return folder


def lay_out(files: list[PushFile], folder: Path) -> Path:
    """The files of a push as somebody finds them who fetched the repository."""
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content if isinstance(file.content, bytes) else file.content.read_bytes())
    return folder


def model_folder(checkpoint: Path, folder: Path, with_optimizer: bool = False) -> Path:
    """The model alone of a checkpoint, as it is published, without card, results and report."""
    files = plan_push(checkpoint, Contents(with_optimizer=with_optimizer))
    manifest = next(file.content for file in files if file.path == "manifest.json")
    assert isinstance(manifest, bytes)
    listed = {"manifest.json", *json.loads(manifest)["files"]}
    return lay_out([file for file in files if file.path in listed], folder)
