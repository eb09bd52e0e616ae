"""Finetuning from end to end: learning rates by layer, frozen parts, resuming, and a folder that needs nothing else."""

import math
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.train.support import (
    Blow,
    Child,
    assert_same_bits,
    assert_same_run,
    fresh_process,
    metrics,
    on_ranks,
    pretrain_child,
    tensors,
    tiny,
    train,
)
from tests.train.tasks_support import PRETRAINING, TASKS, Notes, finetuned, names, percents, same, scored, tuned
from vlmoe_core.checkpoint.layout import list_checkpoints, step_of
from vlmoe_core.data.collate import collate
from vlmoe_core.data.stream import open_streams
from vlmoe_core.errors import DataError, RecipeError, TrainError, UsageError
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import recipe_preparer
from vlmoe_core.train.init import load_run_recipe, open_start
from vlmoe_core.train.optim import FACTOR, learning_rate
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import Trainer, open_stepper
from vlmoe_core.train.session import RunOptions, open_session
from vlmoe_core.train.step import Stepper
from vlmoe_core.train.trained import Trained, load_finetuned, load_trained, newest_finetuned, newest_pretrained

BEST = {"vqa": "accuracy", "nlvr2": "accuracy", "retrieval": "mean", "classification": "top1", "nli": "accuracy"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run."""
    folder = tmp_path_factory.mktemp("base")
    return train(tiny(folder, *PRETRAINING), folder / "run").folder


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task from the pretrained one, never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    return {task: finetuned(folder, task, init=str(base)) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_trains_and_tells_its_metric(straight: dict[str, Path], task: str) -> None:
    lines = [line for line in metrics(straight[task]) if line["split"] == "eval"]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        assert 0 <= line[f"metric/{BEST[task]}"] <= 100 and line["loss/total"] > 0
    trained = [line for line in metrics(straight[task]) if line["split"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4] and all(line["grad_norm"] > 0 for line in trained)


def test_a_task_can_be_learned(tmp_path: Path) -> None:
    """The same few pictures, until their classes are known."""
    run = finetuned(
        tmp_path,
        "classification",
        "train={steps: 150, eval_every: 150, save_every: 150, log_every: 50}",
        "data.train.image=[{source: scenes, task: classification, size: 16, image_size: 16}]",
        "data.eval.image=[{source: scenes, task: classification, size: 16, image_size: 16}]",
        "model.drop_path=0",
    )
    before, after = (line["metric/top1"] for line in metrics(run) if line["split"] == "eval")
    assert before < 50 and after > 90


def test_the_best_checkpoint_is_that_of_the_highest_metric(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss does not choose it: here it falls while the metric falls too."""
    reached = iter([10.0, 70.0, 30.0, 70.0, 20.0])

    def percents_of(self: Any) -> dict[str, float]:
        return {"accuracy": next(reached)}

    monkeypatch.setattr("vlmoe_core.tasks.task.Scores.percents", percents_of)
    run = finetuned(tmp_path, "nli", "train={steps: 4, eval_every: 1, save_every: 9, keep_last: 1}", init=str(base))
    assert [step_of(path) for path in list_checkpoints(run)] == [1, 4]


@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_each_group_has_the_rate_of_the_step_times_its_factor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer_decay: float
) -> None:
    seen: list[dict[float, float]] = []
    update = Stepper._update

    def spy(self: Stepper, step: int) -> Any:
        groups = self.optimizer.param_groups
        seen.append({group[FACTOR]: group["lr"] for group in groups})
        assert [g["lr"] for g in groups] == [learning_rate(step, 4, self.config) * g[FACTOR] for g in groups]
        return update(self, step)

    monkeypatch.setattr(Stepper, "_update", spy)
    loaded = tuned(tmp_path, "vqa", f"optim.layer_decay={layer_decay}", "optim.head_lr=20")
    train(loaded, tmp_path / "run")
    factors = {0.125, 0.25, 0.5, 1.0, 20.0} if layer_decay < 1 else {1.0, 20.0}
    assert [set(found) for found in seen] == [factors] * 4
    told = [line["lr"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert told == [found[1.0] for found in seen] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_a_factor_scales_the_first_update(tmp_path: Path) -> None:
    """AdamW's first update is the rate times the sign of the gradient: three factors, three sizes."""
    overrides = ("optim={lr: 1.0e-3, layer_decay: 0.5, head_lr: 20, weight_decay: 0, eps: 1.0e-12}",)
    loaded = tuned(tmp_path, "vqa", *overrides, "train.steps=1", "model.drop_path=0")
    session = open_session(loaded, RunOptions(tmp_path / "run"), Reporter())
    before = {name: value.clone() for name, value in session.objective.state_dict().items()}
    Trainer(session, Reporter()).stepper(0, [next(session.train_micros())])
    moved = {name: (value - before[name]).abs().max().item() for name, value in session.objective.state_dict().items()}
    expected = {
        "encoder.embeddings.text.word.weight": 0.125,
        "encoder.blocks.0.attention.qkv.weight": 0.25,
        "encoder.blocks.1.attention.qkv.weight": 0.5,
        "encoder.norm.weight": 1.0,
        "head.1.out.weight": 20.0,
    }
    assert {name: moved[name] for name in expected} == pytest.approx(
        {name: 1e-3 * factor for name, factor in expected.items()}, rel=1e-2
    )


@pytest.mark.parametrize("frozen", [("routers",), ("experts",), ("routers", "experts")])
def test_what_is_frozen_keeps_its_bits_while_the_rest_moves(base: Path, tmp_path: Path, frozen: tuple[str]) -> None:
    run = finetuned(tmp_path, "retrieval", f"train.freeze=[{', '.join(frozen)}]", init=str(base))
    start = open_start(str(base))
    assert start is not None
    after, found = tensors(run, 4), start.checkpoint.model
    parts = {"routers": ".router.", "experts": ".experts."}
    encoder = [n.removeprefix("model/") for n in after if n.startswith("model/encoder.")]
    still = [name for name in encoder if any(parts[part] in name for part in frozen)]
    assert len(still) >= 2
    now = {name: after[f"model/{name}"] for name in encoder}
    assert same(now, {name: found[name] for name in encoder}, still) == still
    assert not [name for name in after if name.startswith("optimizer/") and any(name.endswith(s) for s in still)]
    other = [p for p in parts if p not in frozen]
    weights = [n for n in encoder if n.endswith("weight") and n not in still]
    moves = [name for name in weights if name not in same(now, {n: found[n] for n in weights}, weights)]
    assert "encoder.blocks.0.attention.qkv.weight" in moves
    assert all(any(parts[part] in name for name in moves) for part in other)


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    base: Path, straight: dict[str, Path], tmp_path: Path, task: str
) -> None:
    loaded, run = tuned(tmp_path, task, init=str(base)), tmp_path / "run"
    blow = Blow("vlmoe_core.train.run:Stepper", "__call__", 3)
    assert Child(pretrain_child, loaded, run, None, blow).wait() == -signal.SIGKILL
    # The checkpoint of step 2 is written while the third step is taken.
    assert [step_of(path) for path in list_checkpoints(run)] in ([], [2])
    train(loaded, run, resume="auto")
    assert_same_run(run, straight[task], 4)


def test_going_on_does_not_read_the_weights_of_the_start_again(
    base: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(straight["nli"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(base), str(copy)))
    loaded = tuned(tmp_path, "nli", init=str(copy))
    for shard in copy.rglob("model-*.safetensors"):
        shard.unlink()
    train(loaded, tmp_path / "run", resume="auto")
    assert_same_bits(tensors(tmp_path / "run", 4), tensors(straight["nli"], 4))


STEADY = ("noise=0", "capacity_factor=null", "balance={vloss: 0}")
"""What makes a step of a sparse model independent of how its examples are grouped."""


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_take_the_step_of_one(base: Path, tmp_path: Path, task: str) -> None:
    """Contrast compares the pairs of both; the loss, the gradient's norm and the metric are those of one process."""
    stream = {"classification": "image", "nli": "text"}.get(task, "pair")
    steady = [f"model.moe.{pool}.{setting}" for pool in ("vision", "text") for setting in STEADY]
    # Negatives of matching are drawn among the pairs of a rank: here they are left out.
    overrides = [*steady, "train.steps=2", "model.drop_path=0", *["task.itm_weight=0"] * (task == "retrieval")]
    halves = tuned(tmp_path, task, *overrides, f"batch.micro.{stream}=4", init=str(base))
    on_ranks(2, pretrain_child, halves, tmp_path / "two")
    train(tuned(tmp_path, task, *overrides, init=str(base)), tmp_path / "one")
    one, two = ([line for line in metrics(tmp_path / run) if line["split"] == "train"] for run in ("one", "two"))
    kept = ("loss/total", "grad_norm", "lr")
    assert [two[0][name] for name in kept] == pytest.approx([one[0][name] for name in kept], rel=1e-4)
    one, two = ([line for line in metrics(tmp_path / run) if line["split"] == "eval"] for run in ("one", "two"))
    assert two[0][f"metric/{BEST[task]}"] == one[0][f"metric/{BEST[task]}"]


def predictions(trained: Trained) -> Tensor:
    """The raw outputs for the first examples of data.test."""
    recipe = trained.recipe
    assert recipe.task is not None
    task = open_task(recipe.task)
    preparer = recipe_preparer(recipe, trained.tokenizers.text, trained.tokenizers.labels, training=False)
    stream = open_streams(recipe.data, recipe.data.test, 0, trained.tokenizers.text)[task.stream]
    samples = [preparer(task.stream, place, stream[place], random.Random(0)) for place in range(6)]
    batch = collate(task.stream, samples, recipe.model.image_size, recipe.model.num_patches)
    with torch.no_grad():
        outputs: Tensor = trained.objective({task.stream: batch}).outputs
    return outputs


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_that_was_moved_predicts_the_same_bits(base: Path, tmp_path: Path, task: str) -> None:
    """And what it was started from is gone, labels and tokenizer are inside."""
    start = tmp_path / "start"
    shutil.copytree(base, start)
    run = finetuned(tmp_path, task, "train.steps=2", init=str(start))
    expected = predictions(load_trained(run))
    before = scored(run)
    shutil.rmtree(start)
    (tmp_path / f"{task}.yaml").unlink()
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    run.rename(moved)
    again = load_finetuned(moved, task)
    assert predictions(again).equal(expected)
    after = scored(again)
    assert names(after) == names(before) and percents(after) == percents(before)
    if task != "retrieval":
        assert after.answers == before.answers and again.tokenizers.labels.names
    lone = tmp_path / "lone"
    shutil.copytree(moved / "checkpoints" / "step-00000002", lone / "step-00000002")
    assert predictions(load_trained(lone / "step-00000002")).equal(expected)


@pytest.mark.parametrize(("pool", "layer"), [("text", 0), ("vision", 1)])
def test_a_loss_of_retrieval_that_is_not_finite_is_named(tmp_path: Path, pool: str, layer: int) -> None:
    """Images and texts alone come from the stream of pairs; in layer 1 no other sequence has a sparse pool."""
    fresh_process()
    loaded = tuned(tmp_path, "retrieval", f"model.moe.{pool}.layers=[{layer}]")
    session = open_session(loaded, RunOptions(tmp_path / "run"), Reporter())
    stepper = open_stepper(session)
    with torch.no_grad():
        session.objective.get_parameter(f"encoder.blocks.{layer}.ffn.{pool}.router.weight").fill_(math.nan)
    with pytest.raises(TrainError, match=rf"balance/{pool}/{layer} \(pair stream, positions 0 to 7\)"):
        stepper(0, [session.train_data[0]])


def test_the_held_out_loss_of_retrieval_is_its_contrast(straight: dict[str, Path]) -> None:
    lines = [line for line in metrics(straight["retrieval"]) if line["split"] == "eval"]
    assert len(lines) == 3
    for line in lines:
        assert [name for name in line if name.startswith("loss/")] == ["loss/total", "loss/itc"]
        assert line["loss/total"] == line["loss/itc"] > 0


def flat_pictures(folder: Path, readable: bool) -> str:
    """Pictures in a folder without classes, and a data.eval that reads them."""
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(folder / f"{number}.png")
        if not readable:
            (folder / f"{number}.png").write_bytes(b"torn")
    return f"data.eval.image=[{{source: image-folder, path: {folder}}}]"


def test_held_out_data_without_the_truth_are_refused_before_the_first_step(tmp_path: Path) -> None:
    loaded = tuned(tmp_path, "classification", flat_pictures(tmp_path / "flat", readable=True))
    with pytest.raises(DataError, match=r"^data\.eval does not hold the truth, .* list those without under data\.test"):
        train(loaded, tmp_path / "run")
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("task", ["classification", None])
def test_held_out_data_that_are_all_broken_are_refused(tmp_path: Path, task: str | None) -> None:
    torn = (flat_pictures(tmp_path / "flat", readable=False), "data.on_error=skip")
    if task is None:
        loaded = tiny(tmp_path, *torn, "data.eval.text=[]", "data.eval.pair=[]")
    else:
        loaded = tuned(tmp_path, task, *torn)
    with pytest.raises(DataError, match=r"^data\.eval has no readable example; mend"):
        train(loaded, tmp_path / "run")
    if task is not None:
        for found in on_ranks(2, pretrain_child, tuned(tmp_path, task, *torn, "batch.micro.image=4"), tmp_path / "two"):
            assert isinstance(found, DataError) and "no readable example" in str(found)


def test_ranks_refuse_together_an_example_with_too_many_pictures(tmp_path: Path) -> None:
    """Of the two pictures of a statement the head takes one: each example is as one that can't be read."""
    loaded = tuned(tmp_path, "nlvr2", "task.num_images=1", "batch.micro.pair=4")
    found = on_ranks(2, pretrain_child, loaded, tmp_path / "run")
    assert [type(one) for one in found] == [DataError] * 2 and str(found[0]) == str(found[1])
    assert ": has 2 pictures, the head takes 1; set task.num_images (position" in str(found[0])


def test_contrast_refuses_accumulation(base: Path, tmp_path: Path) -> None:
    loaded = tuned(tmp_path, "retrieval", "batch.micro.pair=4", init=str(base))
    with pytest.raises(RecipeError, match=r"2 micro-batches on 1 processes would cut .*size / micro is 1") as caught:
        train(loaded, tmp_path / "run")
    assert "contrast" in str(caught.value) and not (tmp_path / "run").exists()
    told = [type(found) for found in on_ranks(2, opens, loaded, tmp_path / "two")]
    assert told == [bool, bool]


def opens(loaded: Any, out: Path) -> bool:
    """For a child: whether a session starts."""
    open_session(loaded, RunOptions(out), Reporter())
    return True


def test_a_task_without_an_example_of_its_stream_is_refused(tmp_path: Path) -> None:
    """Sentences under text say nothing to a task about pictures; it would train on nothing."""
    tuned(tmp_path, "nli")
    path = tmp_path / "nli.yaml"
    path.write_text(path.read_text().replace("name: nli", "name: nlvr2"))
    with pytest.raises(RecipeError, match=r"^task nlvr2 reads data\.train\.pair, but data\.train has sources of: text"):
        train(load_run_recipe(str(path)), tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_sources_that_the_task_never_reads_are_refused(tmp_path: Path, split: str) -> None:
    more = (f"data.{split}.text=[{{source: scenes, size: 8}}]",)
    if split == "train":
        more = (*more, "batch.size.text=8", "batch.micro.text=8")
    with pytest.raises(RecipeError, match=rf"task vqa reads data\.{split}\.pair, but .* of: text, pair; list the"):
        train(tuned(tmp_path, "vqa", *more), tmp_path / "run")


def test_a_source_without_labels_is_refused(tmp_path: Path) -> None:
    loaded = tuned(tmp_path, "nlvr2", "data.train.pair=[{source: scenes, size: 8, image_size: 16}]")
    with pytest.raises(DataError, match=r"label|picture"):
        train(loaded, tmp_path / "run")


def test_labels_are_told_and_kept(straight: dict[str, Path], tmp_path: Path, base: Path) -> None:
    notes = Notes()
    train(tuned(tmp_path, "nli", "train.steps=2", init=str(base)), tmp_path / "run", reporter=notes)
    assert "3 labels: entailment, neutral, contradiction" in notes.told
    assert load_trained(tmp_path / "run").tokenizers.labels.names == ("entailment", "neutral", "contradiction")
    assert len(load_trained(straight["classification"]).tokenizers.labels.names) == 10


def test_the_newest_run_that_fits_is_found(straight: dict[str, Path], base: Path, tmp_path: Path) -> None:
    for number, run in enumerate([straight["vqa"], base, straight["nli"]]):
        shutil.copytree(run, tmp_path / "runs" / f"{number}")
    older, newer = tmp_path / "runs" / "0", tmp_path / "runs" / "many" / "seed-4"
    shutil.copytree(older, newer)
    (newer / "metrics.jsonl").touch()
    assert newest_finetuned("vqa", tmp_path / "runs") == newer
    shutil.rmtree(newer / "checkpoints" / "step-00000004")  # unfinished: step 2 of 4
    assert newest_finetuned("vqa", tmp_path / "runs") == older
    assert newest_finetuned("nli", tmp_path / "runs").name == "2"
    assert newest_pretrained("pair", tmp_path / "runs").name == "1"
    with pytest.raises(UsageError, match=r"no finished run under .*retrieval; make one with 'vlmoe finetune quickst"):
        newest_finetuned("retrieval", tmp_path / "runs")


def test_a_model_of_another_task_is_refused(straight: dict[str, Path], base: Path) -> None:
    with pytest.raises(UsageError, match=r"was finetuned on nli; to use it on vqa: vlmoe finetune RECIPE --model "):
        load_finetuned(straight["nli"], "vqa")
    with pytest.raises(UsageError, match=re.escape(f"{base} was pretrained, not finetuned; to use it on vqa: ")):
        load_finetuned(base, "vqa")
